"""What a model's forward does with tensors that torch.export would miss.

- A tensor that the forward reaches around the module's own names (a dict, a list, a closure) is
  seen as the parameter or buffer that it is; one that is neither and needs a gradient is refused.
- ``tensor.data`` is read as ``tensor.detach()``; assigning it to a buffer writes to the buffer.
- Every tensor that the forward creates is remembered weakly, to find those that it left behind.
"""

from __future__ import annotations

import sys
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError
from autopipe.interrupts import raise_interrupt
from autopipe.passes._torch import PACK_PADDED, READ_VERSION, is_traced, storage_id
from autopipe.passes._torch_modes import without_dispatch_modes
from autopipe.passes.graph import is_user_file, symbolic_size, user_source_line

from .packed_sequences import packed_error
from .value_checks import READS_VALUES, Branches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .ambient import CallModes
    from .state import PythonState

READ_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
READ_FLAG: Any = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
READ_LEAF: Any = Tensor.is_leaf.__get__  # type: ignore[attr-defined]
READ_NODE: Any = Tensor.grad_fn.__get__  # type: ignore[union-attr]
READ_FLAGS = (READ_FLAG, READ_LEAF, READ_NODE)
LAYOUT = (Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset, Tensor.dim_order)
SET_FLAG: Any = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
READ_GRADIENT: Any = Tensor.grad.__get__  # type: ignore[union-attr]
TO_PYTHON = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
ASSIGN_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


class TensorNames:
    """The names of a model's parameters and buffers, for tensors found elsewhere.

    Args:
        model: before its tensors are replaced by fakes.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(t): name for name, t in tensors}
        self._kept = [t for _, t in tensors]

    def name(self, tensor: Tensor) -> str | None:
        """The name of an original tensor; None if it was neither a parameter nor a buffer."""
        return self._names.get(id(tensor))

    def current(self, model: nn.Module, tensor: Tensor) -> Tensor | None:
        """The tensor that has, at present, the name of an original one.

        Args:
            model: its tensors may be fakes now.
            tensor: any tensor.

        Returns:
            None if it was neither a parameter nor a buffer.
        """
        name = self.name(tensor)
        if name is None:
            return None
        path, _, last = name.rpartition(".")
        found: Tensor = getattr(model.get_submodule(path), last)
        return found


TRACER = "torch.fx.experimental.proxy_tensor"


class TensorMode(TorchFunctionMode):
    """Intercepts torch's functions while a model's forward runs.

    Args:
        model: the model.
        names: of its original tensors.
        state: of the model: where it holds a tensor; it is told what the forward asks for.
        modes: of the call that the model is captured for.
        call: calls a function of torch with its arguments.
        inputs: the model's arguments in a trace; empty if the forward runs outside of one.

    Attributes:
        created: the tensors of the trace that it created, as far as they still live.
        branches: those that depend on values.
    """

    def __init__(
        self,
        model: nn.Module,
        names: TensorNames,
        state: PythonState,
        modes: CallModes,
        call: Callable[..., Any],
        *,
        inputs: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self._model, self._names, self._call = model, names, call
        self._where, self._noted, self._modes = state.place_of, state.noted, modes
        self._state = {
            id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())
        }
        self.is_tracing = bool(inputs)
        self._inputs = {id(x) for x in inputs}
        self.created: list[weakref.ref[Tensor]] = []
        self.branches = Branches()
        self._foreign: dict[int, Any] = {}  # the storages of constants that share an array's memory

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise_interrupt()
        kwargs = kwargs or {}
        if func == READ_DATA:
            return self._call(args[0].detach)
        if func == ASSIGN_DATA:
            return self._call(self._assign_data, *args)
        if func in (*READ_FLAGS, READ_GRADIENT):
            return self._read(func, args[0])
        if self.is_tracing and func in READS_VALUES:
            return self.branches.decide(
                func, args, kwargs, frame=sys._getframe(1), noted=self._noted, call=self._call
            )
        if self.is_tracing and func is PACK_PADDED:
            raise packed_error(CaptureError, user_source_line(traceback.extract_stack()))
        if func == READ_VERSION and self.is_tracing and _is_users(2):
            raise CaptureError(
                "the forward reads how often a tensor was changed in place; a trace cannot tell",
                source=user_source_line(traceback.extract_stack()),
                found="Tensor._version",
                remedy="pass what depends on it as an argument",
            )
        if func in LAYOUT and id(args[0]) in self._inputs and _is_users(2):
            self._noted.arguments.add("layout")
        if func in SET_FLAG:
            self._refuse_flag(
                args[0], bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
            )
        if func in TO_PYTHON and self.is_tracing and not is_traced(args[0]):
            self._noted.note_values(args[0], self._where(args[0]))
        if any(type(x) in (Tensor, nn.Parameter) for x in args) or not all(
            isinstance(x, (Tensor, int, float, str, type(None))) for x in args
        ):
            args, kwargs = pytree.tree_map_only(Tensor, self._named, (args, kwargs))
        if self.is_tracing and (written := _written(func, args, kwargs)) is not None:
            self._refuse_write(written)
        result = self._call(func, *args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__") == TRACER:
            return result  # metadata of a node (for an array's memory), not the forward's
        if self.is_tracing and _is_of_other_memory(func, args, kwargs):
            self._foreign[storage_id(result)] = result.untyped_storage()
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and is_traced(x) and not any(x is a for a in args):
                self.created.append(weakref.ref(x))
        return result

    def _read(self, func: Any, tensor: Tensor) -> Any:
        """Answer ``requires_grad`` as outside of the trace; refuse ``grad``: a trace has none."""
        found = self._call(func, tensor)
        if not _is_users(3) or not self.is_tracing:
            return found
        name = self._state.get(id(tensor)) or self._names.name(tensor)
        if func == READ_GRADIENT:
            if name is None:
                return found
            raise CaptureError(
                "the forward reads the gradient of a parameter, which a captured graph cannot",
                source=user_source_line(traceback.extract_stack()),
                found=f"{name}.grad",
                remedy="read it outside of the model, and pass what depends on it as an argument",
            )
        if name is not None:
            self._noted.note_flags({name: found})
            return found
        flags = {name: bool(p.requires_grad) for name, p in self._model.named_parameters()}
        self._noted.note_flags(flags)
        self._noted.arguments.add("flags")
        self._modes.read.add("is_grad_enabled")
        if func != READ_FLAG and id(tensor) in self._inputs:
            self._noted.arguments.add("history")
        if self._modes.outer["is_grad_enabled"] or (func == READ_FLAG and tensor.is_leaf):
            return found
        return {READ_FLAG: False, READ_LEAF: True}.get(func)

    def _named(self, tensor: Tensor) -> Tensor:
        """A tensor that is reached around the model's names, by its name."""
        if is_traced(tensor):
            return tensor
        found = self._names.current(self._model, tensor)
        if found is not None:
            return found
        if tensor.requires_grad and torch.is_grad_enabled() and self.is_tracing:
            place = self._where(tensor)
            raise CaptureError(
                "the forward uses a tensor that needs a gradient, but is no parameter of the model",
                source=user_source_line(traceback.extract_stack()),
                found=f"{place or 'a tensor'} of shape {tuple(tensor.shape)}",
                remedy="register it: assign the nn.Parameter (or the layer that has it) to an"
                " attribute of the module, or put it into nn.ParameterList, nn.ParameterDict or"
                " nn.ModuleList; compute what depends on it in the forward; if it needs no"
                " gradient, detach it, or use it under torch.no_grad()",
            )
        return tensor

    def _refuse_flag(self, tensor: Tensor, wanted: bool) -> None:
        """Refuse to freeze or unfreeze a parameter in the forward: a graph cannot."""
        name = self._state.get(id(tensor)) or self._names.name(tensor)
        if name is not None and tensor.requires_grad != wanted:
            raise CaptureError(
                "the forward sets requires_grad of a parameter, which a captured graph cannot do",
                source=user_source_line(traceback.extract_stack()),
                found=name,
                remedy="set it before the model is called",
            )

    def _refuse_write(self, tensor: Tensor) -> None:
        """Refuse a write to a tensor that is not of the trace: the model's or the user's own."""
        foreign = storage_id(tensor) in self._foreign
        if foreign or not is_traced(tensor):
            raise CaptureError(
                "the forward writes to a tensor that is not a buffer of the model",
                source=user_source_line(traceback.extract_stack()),
                found="memory of an array, in which the next call would find it"
                if foreign
                else self._where(tensor) or f"a tensor of shape {tuple(tensor.shape)}",
                remedy="register it: self.register_buffer(name, tensor); what a forward writes to a"
                " buffer is written once a step",
            )

    def _assign_data(self, tensor: Tensor, value: Tensor) -> None:
        """Carry out ``tensor.data = value``."""
        if id(tensor) not in self._state or not _is_alike(tensor, value):
            raise CaptureError(
                "the forward assigns the .data of a tensor, which a captured graph cannot do",
                source=user_source_line(traceback.extract_stack()),
                expected="a registered buffer, and data of the same shape and dtype",
                found=self._state.get(id(tensor)),
                remedy="compute a new tensor instead, or write into it: buffer.copy_(value)",
            )
        with torch.no_grad():
            tensor.copy_(value.detach().clone())


def _is_users(depth: int) -> bool:
    """Whether the function so many calls up is the user's."""
    return is_user_file(sys._getframe(depth).f_code.co_filename)


def _is_of_other_memory(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the result of a function of torch is a constant in memory of NumPy or others."""
    if func == torch.ops.aten.lift_fresh_copy.default:  # of `from_numpy`, which modes do not see
        real = args[0]
    elif func in (torch.as_tensor, torch.asarray) and args and not isinstance(args[0], Tensor):
        with without_dispatch_modes():
            real = func(*args, **kwargs)
    else:
        return False
    return not is_traced(real) and not real.untyped_storage().resizable()


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a function of torch writes to, as its name says."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.startswith("_")
    if in_place or name == "__setitem__" or name in IN_PLACE:
        found = args[0] if args else None
    else:
        found = kwargs.get("out")
    return found if isinstance(found, Tensor) else None


IN_PLACE = {
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__"),
    *("__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
}
"""Methods of the operators ``+=`` and so on."""


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and list(map(symbolic_size, a.shape)) == list(
        map(symbolic_size, b.shape)
    )
