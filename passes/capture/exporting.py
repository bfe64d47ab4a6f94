"""Run torch.export: silence it, refuse what it would lose, and explain its errors.

torch.export silently drops some constructs from the gradient (tensor hooks, inference mode), and
turns random numbers that are not torch's into constants. Here both raise a `CaptureError`.
"""

from __future__ import annotations

import io
import linecache
import logging
import random
import sys
import traceback
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy
import sympy
import torch
from torch import Tensor, nn

from autopipe.errors import AutopipeError, CaptureError
from autopipe.passes._torch import (
    BackwardHookFunction,
    CheckpointFunction,
    fix_lstm_state_shapes,
    keep_no_grad_regions,
)
from autopipe.passes.graph import is_user_file, user_source_line
from autopipe.passes.ops import apply_function, record_function

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AVOIDING_OPTIONS = (
    "a library's model often has an option that avoids it (in transformers: layerdrop=0.0,"
    " apply_spec_augment=False, a problem_type that is stated)"
)


@dataclass
class SizeUses:
    """How the model's own code used symbolic sizes while it was traced.

    Attributes:
        concretized: lines (``file:line``) that turned a symbolic size into a Python integer, which
            fixes it.
        conditions: (condition on sizes, its value) for each condition that was evaluated.
    """

    concretized: list[str] = field(default_factory=list)
    conditions: list[tuple[Any, bool]] = field(default_factory=list)


def export(
    flat: nn.Module, examples: list[Tensor], dims: list[int | None]
) -> tuple[torch.export.ExportedProgram, SizeUses]:
    """Export a module of flat tensors.

    Args:
        flat: the module.
        examples: its arguments.
        dims: for each argument, the dimension that becomes symbolic, or None.

    Returns:
        The exported program, and how the module's code used symbolic sizes.

    Raises:
        CaptureError: torch.export cannot capture the module, or would change its gradients.
    """
    shapes = tuple({} if d is None else {d: torch.export.Dim.AUTO} for d in dims)
    try:
        with ExitStack() as stack:
            for context in (
                _refuse_lossy_constructs(),
                _refuse_foreign_randomness(),
                keep_no_grad_regions(),
                fix_lstm_state_shapes(),
                _silence_export(),
            ):
                stack.enter_context(context)
            stack.enter_context(torch.enable_grad())
            sizes = stack.enter_context(_record_size_uses())
            program = torch.export.export(
                flat, tuple(examples), dynamic_shapes=(shapes,), strict=False
            )
            return program, sizes
    except AutopipeError:
        raise
    except Exception as error:
        raise _explain(error) from error


@contextmanager
def _silence_export() -> Iterator[None]:
    """Hide export's logs (whole graphs when it fails) and its deprecation warnings."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            with redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.disable(level)


@contextmanager
def _record_size_uses() -> Iterator[SizeUses]:
    """Record what the model's own code does with symbolic sizes: len(x), range(n), n == 3."""
    sizes = SizeUses()

    def recording(original: Any, size_of: Callable[..., Any]) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if is_user_file(caller.f_code.co_filename):
                size = size_of(*args, **kwargs)
                if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                    sizes.concretized.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
            return original(*args, **kwargs)

        return recorded

    def first_size(x: Tensor) -> Any:
        return x.shape[0] if x.ndim else None

    def size_along(x: Tensor, dim: int = 0) -> Any:
        return x.shape[dim]

    to_bool: Any = torch.SymBool.__bool__

    def recorded_bool(condition: torch.SymBool) -> bool:
        expr, caller = condition.node.expr, sys._getframe(1)
        value: bool = to_bool(condition)
        if is_user_file(caller.f_code.co_filename):
            sizes.conditions.append((expr, value))
            if value and isinstance(expr, sympy.Eq):  # n == 3
                sizes.concretized.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return value

    with ExitStack() as stack:
        for owner, name, size_of in (
            (Tensor, "__len__", first_size),
            (Tensor, "__iter__", first_size),
            (Tensor, "unbind", size_along),
            (torch, "unbind", size_along),
            (torch.SymInt, "__index__", lambda size: size),
        ):
            replacement = recording(getattr(owner, name), size_of)
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(mock.patch.object(torch.SymBool, "__bool__", recorded_bool))
        yield sizes


@contextmanager
def _refuse_foreign_randomness() -> Iterator[None]:
    """Refuse random numbers from Python or numpy: they would become constants of the graph."""

    def error_for(name: str) -> Any:
        return CaptureError(
            f"{name} is called inside the model: its random number would become a constant",
            source=user_source_line(traceback.extract_stack()),
            found=name,
            remedy=f"draw with torch (torch.rand) inside the model; {AVOIDING_OPTIONS}",
        )

    with ExitStack() as stack:
        for module in (random, numpy.random):
            for name, function in vars(module).items():
                owner = getattr(function, "__self__", None)
                if isinstance(owner, (random.Random, numpy.random.RandomState)) and (
                    name not in ("seed", "getstate", "setstate", "get_state", "set_state")
                ):
                    refuse = partial(_raise_in_user_code, function, error_for, name)
                    stack.enter_context(mock.patch.object(module, name, refuse))
        yield


def _raise_in_user_code(
    function: Any, error: Callable[[str], Exception], name: str, *args: Any, **kwargs: Any
) -> Any:
    if is_user_file(sys._getframe(1).f_code.co_filename):
        raise error(f"{function.__self__.__class__.__module__}.{name}")
    return function(*args, **kwargs)


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
        caller = sys._getframe(1).f_code.co_filename
        if not is_user_file(caller):  # fake tensors use it internally
            return enter(mode)
        raise CaptureError(
            "inference mode inside the model: the captured graph would not have it",
            source=user_source_line(traceback.extract_stack()),
            remedy="use torch.no_grad() there",
        )

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.inference_mode, "__enter__", refuse_inference))
        stack.enter_context(
            mock.patch.object(torch.autograd.Function, "apply", classmethod(keep_function))
        )
        stack.enter_context(mock.patch.object(Tensor, "register_hook", refuse_hook))
        for name in ("grad", "backward"):
            stack.enter_context(
                mock.patch.object(torch.autograd, name, partial(_refuse_derivative, name))
            )
        yield


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


def _explain(error: Exception) -> CaptureError:
    """Turn export's error into a short one with the line of the model."""
    source = user_source_line(traceback.extract_tb(error.__traceback__))
    kind, text = type(error).__name__, str(error)
    first = next((line for line in text.splitlines() if line.strip()), kind)
    if source is not None:
        file, _, number = source.rpartition(":")
        first = f"{linecache.getline(file, int(number)).strip()}  ({first})"
    if "DataDependent" in kind or "data-dependent" in text.lower():
        return CaptureError(
            "control flow that depends on the values of tensors cannot be captured",
            source=source,
            found=first,
            remedy="compute both branches and select with torch.where, or decide outside of the"
            f" model and pass the decision in as a Python value; {AVOIDING_OPTIONS}",
        )
    return CaptureError(
        "torch.export cannot capture the model",
        source=source,
        found=f"{kind}: {first}",
        remedy="check that the model itself runs on these inputs; if it does, make"
        " torch.export.export(model, args, kwargs, strict=False) work first (its error is the cause"
        " of this one)",
    )
