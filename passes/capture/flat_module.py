"""`FlatModel`: a model as a function from flat tensors to flat tensors, for torch.export."""

from __future__ import annotations

import dataclasses
import enum
import pathlib
import re
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError
from autopipe.passes._torch import is_traced
from autopipe.passes.python_state import (
    CallModes,
    CallWatch,
    Change,
    PythonState,
    TensorMode,
    TensorNames,
    ambient_modes,
    check_modes,
    forget_tensors,
    refuse_replaced_modules,
)

from .argument_changes import describe_changes, entries
from .buffer_assignment import is_assigned_buffer, write_in_place
from .buffer_state import preserve_buffers
from .containers import is_cache, kinds_in, take_apart
from .failures import missing_target
from .passed_numbers import PassedNumbers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from autopipe.passes.python_state import Reads

PLAIN_TYPES = (
    *(int, float, complex, bool, str, bytes, type(None), enum.Enum, range, slice, pathlib.PurePath),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class TensorSlot:
    """A placeholder for a tensor among the leaves of a result."""


@dataclasses.dataclass
class ForwardResult:
    """What the last forward returned and changed.

    Attributes:
        leaves: the flattened result, with a `TensorSlot` in place of each tensor.
        spec: its structure; None before the first forward.
        notes: descriptions of what was left out of the result.
        changed: other Python values that the forward changed (they have been restored).
        assigned: qualified names of the buffers that it assigned.
        reads: the Python values that it read.
        created: the tensors that it created, some of which may still live.
        remarks: what the forward does that a pipeline does not.
        clocks: function that tells the time → the line that calls it.
    """

    leaves: list[Any] = dataclasses.field(default_factory=list)
    spec: pytree.TreeSpec | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    changed: list[Change] = dataclasses.field(default_factory=list)
    assigned: list[str] = dataclasses.field(default_factory=list)
    reads: Reads | None = None
    created: list[weakref.ref[Tensor]] = dataclasses.field(default_factory=list)
    remarks: tuple[str, ...] = ()
    clocks: dict[str, str] = dataclasses.field(default_factory=dict)


TARGET = "target of loss_fn"
"""The keyword of a call's target; a model's own arguments have no such names."""


class FlatModel(nn.Module):
    """A model as a function from flat tensors to flat tensors.

    Python values that a forward changes are recorded in `result` and restored. The new value of a
    buffer that the model assigns is written in place, so that the graph records it.
    """

    prefix = "model."
    """Prefix of the model's own names in an exported program."""

    def __init__(
        self,
        model: nn.Module,
        leaves: Sequence[Any],
        spec: pytree.TreeSpec,
        numbers: Collection[int] = (),
        loss_fn: Callable[..., Any] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: is not changed.
            leaves: flattened ``(args, kwargs)``; leaves that are not tensors become constants.
            spec: structure of ``(args, kwargs)``.
            numbers: positions of tensors of one entry that the model gets as numbers.
            loss_fn: is called with the model's result and the argument `TARGET`, if there is one;
                the function then returns what it returns.
        """
        super().__init__()
        self.model = model
        self.training = model.training
        self.tensor_positions = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        self._template = _Opaque([None if isinstance(x, Tensor) else x for x in leaves])
        self._spec = _Opaque(spec)
        self._loss_fn = _Opaque(loss_fn)
        self._numbers = _Opaque(PassedNumbers({i: leaves[i].item() for i in numbers}))
        self._names = _Opaque(TensorNames(model))
        self._modes = _Opaque(CallModes())
        self._result = ForwardResult()  # an object: export forbids new attributes
        self._same = _Opaque({})

    @property
    def result(self) -> ForwardResult:
        """What the last forward returned and changed."""
        return self._result

    @property
    def tells_objects_apart(self) -> bool:
        """Whether the last forward may tell whether two arguments are the same object."""
        return self._result.reads is not None and self._result.reads.asked.identity

    @property
    def numbers(self) -> PassedNumbers:
        """The arguments that are numbers without a value in a trace."""
        found: PassedNumbers = self._numbers.value
        return found

    def with_values(self) -> FlatModel:
        """The same function of the other tensors, with the numbers as constants."""
        leaves: list[Any] = list(self._template.value)
        kept = [n for n, p in enumerate(self.tensor_positions) if p not in self.numbers]
        for n, position in enumerate(self.tensor_positions):
            leaves[position] = torch.empty(0) if n in kept else self.numbers.values[position]
        flat = FlatModel(self.model, leaves, self._spec.value, (), self._loss_fn.value)
        same = self._same.value
        flat.share({kept.index(n): kept.index(first) for n, first in same.items()})
        return flat

    def share(self, same: Mapping[int, int]) -> None:
        """Pass some of the tensors in the place of others, too.

        Args:
            same: position of a tensor → position of the one that takes its place.
        """
        self._same.value = same

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves, numbers = list(self._template.value), self.numbers
        numbers.start()
        for n, position in enumerate(self.tensor_positions):
            tensor = tensors[self._same.value.get(n, n)]
            leaves[position] = numbers.number(position, tensor) if position in numbers else tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec.value)
        given = entries(args, kwargs)
        state = PythonState(self.model)
        state.add_arguments(
            [*self._template.value, self._loss_fn.value], kinds_in(self._spec.value)
        )
        call_modes = self._modes.value
        watch = CallWatch(state, call_modes)
        tracing = any(map(is_traced, tensors))
        mode = TensorMode(
            self.model,
            self._names.value,
            state,
            call_modes,
            watch.asleep,
            inputs=tensors if tracing else (),
        )
        modes = ambient_modes()
        with preserve_buffers(self.model):
            try:
                with mode, call_modes.visible(), watch.watching():
                    out = self._call(args, kwargs)
            finally:
                changed = state.changes()
                for change in reversed(changed):
                    change.set("before")
                state.clear_caches()
        mode.branches.refuse_caught()
        check_modes(modes)
        state.check_generators()
        refuse_replaced_modules(changed)
        assigned = [c for c in changed if is_assigned_buffer(c)]
        result = self._result
        result.assigned = [str(c) for c in assigned]
        result.changed = [c for c in changed if not is_assigned_buffer(c)]
        if tracing:  # what is kept of a trace would look left behind
            result.changed = [forget_tensors(c) for c in result.changed]
        result.reads = state.reads(result.changed, call_modes)
        result.created = mode.created
        remarks = *state.noted.remarks, *describe_changes(given, entries(args, kwargs))
        result.remarks, result.clocks = remarks, state.noted.clocks
        found = self._flatten_result(out, kwargs)
        result.notes += state.noted.notes
        _refuse_sizes_in_text(result.leaves, tensors, numbers.names)
        return write_in_place(self.model, assigned, found)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model, and the loss function if the call has a target for it."""
        if TARGET not in kwargs:
            return self.model(*args, **kwargs)
        own = {name: value for name, value in kwargs.items() if name != TARGET}
        output = self.model(*args, **own)
        try:
            return self._loss_fn.value(output, kwargs[TARGET])
        except (TypeError, AttributeError) as error:
            if kwargs[TARGET] is None:
                raise missing_target(error) from error
            raise

    def _flatten_result(self, out: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a result; its other leaves are stored in `result`."""
        found, spec = pytree.tree_flatten(take_apart(out), is_leaf=is_cache)
        result = self._result
        result.leaves, result.spec, result.notes = [], spec, []
        tensors = []
        for leaf in found:
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                result.leaves.append(TensorSlot())
            elif is_cache(leaf):
                if kwargs.get("use_cache"):
                    raise CaptureError(
                        "the call asks for a key/value cache, which a pipeline does not return",
                        found=type(leaf).__name__,
                        remedy="call without use_cache=True",
                    )
                result.notes.append(f"left out of the result: {type(leaf).__name__}")
                result.leaves.append(None)
            elif isinstance(leaf, (*PLAIN_TYPES, torch.SymInt, torch.SymFloat, torch.SymBool)):
                result.leaves.append(leaf)
            else:
                raise CaptureError(
                    "the model returns an object that is neither a tensor nor a known container",
                    found=f"{type(leaf).__module__}.{type(leaf).__qualname__}",
                    remedy="return tensors in tuples, lists, dicts, named tuples or dataclasses, or"
                    " register the class with torch.utils._pytree.register_pytree_node",
                )
        return tensors


def _refuse_sizes_in_text(
    leaves: Sequence[Any], tensors: Sequence[Tensor], numbers: set[str]
) -> None:
    """Refuse a text in a result that has a symbol's name in the place of a size or number."""
    sizes: list[Any] = [n for x in tensors for n in x.shape if isinstance(n, torch.SymInt)]
    names = {re.escape(str(s)) for n in sizes for s in n.node.expr.free_symbols} | numbers
    for leaf in leaves:
        if isinstance(leaf, str) and any(re.search(rf"\b{name}\b", leaf) for name in names):
            raise CaptureError(
                "the model returns a text that tells the size of the batch",
                found=repr(leaf),
                remedy="return the size itself (x.shape[0]), and write the text outside",
            )


@dataclasses.dataclass
class _Opaque:
    """Hides a container from torch.export, which visits a module's attributes."""

    value: Any
