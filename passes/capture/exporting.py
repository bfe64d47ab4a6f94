"""Run torch.export: silence it, and refuse what it would lose.

torch.export silently drops some constructs from the gradient (tensor hooks, inference mode). Here
they raise a `CaptureError`.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.errors import AutopipeError, CaptureError
from autopipe.passes._torch import (
    BackwardHookFunction,
    CheckpointFunction,
    free_unbacked_symbols,
)
from autopipe.passes._torch_patches import (
    fix_lstm_state_shapes,
    keep_no_grad_regions,
    quiet_export,
    silent_logs,
    take_masks_as_given,
)
from autopipe.passes.graph import is_user_file, known_shapes, user_source_line
from autopipe.passes.one_at_a_time import replaced
from autopipe.passes.ops import APPLY_OWNER, apply_function, record_function

from .any_size import keep_sizes_symbolic
from .buffer_state import preserve_attributes
from .explain import explain, own_class_error, weights_of_own_class
from .size_uses import SizeUses, record_size_uses
from .vmaps import flatten_vmaps

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .flat_module import FlatModel
    from .symbolic_dims import SymbolicDims

ENTERS_FOR_OTHERS = {contextlib.__file__, torch.no_grad()(lambda: None).__code__.co_filename}
"""Files whose code enters a context for its caller: `ExitStack`, decorators (``@no_grad()``)."""


def export(
    flat: FlatModel, examples: Sequence[Tensor], dims: Sequence[SymbolicDims]
) -> tuple[torch.export.ExportedProgram, SizeUses]:
    """Export a module of flat tensors.

    Args:
        flat: the module.
        examples: its arguments.
        dims: for each argument, the dimensions that become symbolic.

    Returns:
        The exported program, and how the module's code used symbolic sizes.

    Raises:
        CaptureError: torch.export cannot capture the module, or would change its gradients.
    """
    shapes = tuple(d.for_export() for d in dims)
    try:
        with ExitStack() as stack:
            for context in (
                _refuse_lossy_constructs(),
                keep_no_grad_regions(),
                fix_lstm_state_shapes(),
                take_masks_as_given(),
                known_shapes(),
                keep_sizes_symbolic(),
                _silence_export(),
                preserve_attributes(flat),
            ):
                stack.enter_context(context)
            stack.enter_context(torch.enable_grad())
            sizes = stack.enter_context(record_size_uses(flat.numbers))
            program = torch.export.export(
                flat, tuple(examples), dynamic_shapes=(shapes,), strict=False
            )
            _refuse_parts_of_weights(flat, program)
            sizes.fixing_vmaps += flatten_vmaps(program.graph_module)
            return program, sizes
    except AutopipeError:
        raise
    except Exception as error:
        raise explain(error, flat) from error


def _refuse_parts_of_weights(flat: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Refuse a graph that reads inner tensors of a weight: its stages have the weight as a whole.

    Raises:
        CaptureError: it does.
    """
    own = weights_of_own_class(flat)
    names = {
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_buffers,
    }
    for node in program.graph.nodes:
        if own and node.target is torch.ops.export.access_subclass_inner_tensor.default:
            name = names.get(node.args[0].name, next(iter(own)))
            raise own_class_error(
                name, own[name], None, f"the forward reads {node.args[1]!r} of it"
            )


@contextmanager
def _silence_export() -> Iterator[None]:
    """Hide torch's logs and warnings in this thread: whole graphs when export fails."""

    def silent(*args: Any, **kwargs: Any) -> None:
        """Warn of nothing."""

    with (
        quiet_export(),
        silent_logs(),
        replaced(warnings, "warn", silent),
        replaced(warnings, "warn_explicit", silent),
        replaced(warnings, "showwarning", silent),
    ):
        yield


@contextmanager
def _refuse_lossy_constructs() -> Iterator[None]:
    """Keep custom autograd.Functions; refuse constructs that export would silently drop."""

    def keep_function(cls: type[torch.autograd.Function], *args: Any) -> Any:
        if cls.__module__.startswith("torch._library"):  # an operator's registered derivative
            return apply_function(cls, *args)
        source = user_source_line(traceback.extract_stack())
        if cls is CheckpointFunction:  # the pipeline itself decides what is saved for backward
            run, _, *inputs = args
            return run(*inputs)
        if cls is BackwardHookFunction:
            raise _hook_error("a backward hook of a module", source)
        if any(free_unbacked_symbols(x) for x in pytree.tree_leaves(args) if _is_number(x)):
            raise CaptureError(
                "a custom autograd.Function gets a number without a value",
                source=source,
                found=f"{cls.__module__}.{cls.__qualname__}",
                remedy="pass it a tensor instead",
            )
        try:
            return record_function(cls, *args)
        except CaptureError as error:
            raise error.at(source) from None

    def refuse_hook(tensor: Tensor, hook: Any) -> Any:
        name = getattr(hook, "__qualname__", hook)
        source = user_source_line(traceback.extract_stack())
        raise _hook_error(f"Tensor.register_hook({name!s})", source)

    enter: Any = torch.inference_mode.__enter__

    def refuse_inference(mode: Any) -> Any:
        caller = sys._getframe(2)
        while caller.f_code.co_filename in ENTERS_FOR_OTHERS and caller.f_back is not None:
            caller = caller.f_back
        if not is_user_file(caller.f_code.co_filename):  # fake tensors use it internally
            return enter(mode)
        raise CaptureError(
            "inference mode inside the model: the captured graph would not have it",
            source=user_source_line(traceback.extract_stack()),
            remedy="use torch.no_grad() there",
        )

    with ExitStack() as stack:
        stack.enter_context(replaced(torch.inference_mode, "__enter__", refuse_inference))
        stack.enter_context(replaced(APPLY_OWNER, "apply", keep_function))
        stack.enter_context(replaced(Tensor, "register_hook", refuse_hook))
        for name in ("grad", "backward"):
            stack.enter_context(replaced(torch.autograd, name, partial(_refuse_derivative, name)))
        yield


def _is_number(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat))


def _refuse_derivative(name: str, *args: Any, **kwargs: Any) -> None:
    raise CaptureError(
        "the model takes gradients inside its forward: an exported graph has none",
        source=user_source_line(traceback.extract_stack()),
        found=f"torch.autograd.{name}",
        remedy="take them outside of the model, or write the derivative as a formula",
    )


def _hook_error(found: str, source: str | None) -> CaptureError:
    return CaptureError(
        "a hook on a tensor inside the model: the captured graph would not have it",
        source=source,
        found=found,
        remedy="remove the hook (module backward hooks count too), or apply the same change to"
        " the parameters' gradients after backward()",
    )
