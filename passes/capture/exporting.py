"""torch.export, quiet, lossless, and with errors that a person can read."""

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
from autopipe.passes.ops import autograd_function as functions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPTIONS = (
    "a library's model often has an option that avoids it (in transformers: layerdrop=0.0,"
    " apply_spec_augment=False, a problem_type that is stated)"
)


@dataclass
class Sizes:
    """What a model asked of its symbolic sizes while it was traced.

    fixed: lines at which it made a Python number of one; there the size became fixed.
    decisions: conditions that it evaluated, and what they gave.
    """

    fixed: list[str] = field(default_factory=list)
    decisions: list[tuple[Any, bool]] = field(default_factory=list)


def export(
    flat: nn.Module, examples: list[Tensor], dims: list[int | None]
) -> tuple[torch.export.ExportedProgram, Sizes]:
    """Export a module of flat tensors, each symbolic in its entry of `dims`.

    Raises:
        CaptureError: what the exporter cannot do, or would do with a loss.
    """
    shapes = tuple({} if d is None else {d: torch.export.Dim.AUTO} for d in dims)
    try:
        with ExitStack() as stack:
            for context in (
                _lossless(),
                _drawing(),
                keep_no_grad_regions(),
                fix_lstm_state_shapes(),
                _quiet(),
            ):
                stack.enter_context(context)
            stack.enter_context(torch.enable_grad())
            sizes = stack.enter_context(_asked())
            program = torch.export.export(
                flat, tuple(examples), dynamic_shapes=(shapes,), strict=False
            )
            return program, sizes
    except AutopipeError:
        raise
    except Exception as error:
        raise _explain(error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Export logs and prints whole graphs when it fails; its warnings are of its own future."""
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
def _asked() -> Iterator[Sizes]:
    """Note what the model's own code does with symbolic sizes: len(x), range(n), for row in x."""
    sizes = Sizes()

    def watch(original: Any, size_of: Callable[..., Any]) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if is_user_file(caller.f_code.co_filename):
                size = size_of(*args, **kwargs)
                if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                    sizes.fixed.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
            return original(*args, **kwargs)

        return watched

    def first(x: Tensor) -> Any:
        return x.shape[0] if x.ndim else None

    def along(x: Tensor, dim: int = 0) -> Any:
        return x.shape[dim]

    truth: Any = torch.SymBool.__bool__

    def decided(condition: torch.SymBool) -> bool:
        expr, caller = condition.node.expr, sys._getframe(1)
        taken: bool = truth(condition)
        if is_user_file(caller.f_code.co_filename):
            sizes.decisions.append((expr, taken))
            if taken and isinstance(expr, sympy.Eq):  # n == 3
                sizes.fixed.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return taken

    with ExitStack() as stack:
        for owner, name, size_of in (
            (Tensor, "__len__", first),
            (Tensor, "__iter__", first),
            (Tensor, "unbind", along),
            (torch, "unbind", along),
            (torch.SymInt, "__index__", lambda size: size),
        ):
            replacement = watch(getattr(owner, name), size_of)
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(mock.patch.object(torch.SymBool, "__bool__", decided))
        yield sizes


@contextmanager
def _drawing() -> Iterator[None]:
    """Refuse random numbers that torch does not know of: they would become constants."""

    def refused(name: str) -> Any:
        return CaptureError(
            f"{name} draws a number inside the model: in the captured graph it would be a constant",
            source=user_source_line(traceback.extract_stack()),
            found=name,
            remedy=f"draw with torch (torch.rand) inside the model; {OPTIONS}",
        )

    with ExitStack() as stack:
        for module in (random, numpy.random):
            for name, function in vars(module).items():
                owner = getattr(function, "__self__", None)
                if isinstance(owner, (random.Random, numpy.random.RandomState)) and (
                    name not in ("seed", "getstate", "setstate", "get_state", "set_state")
                ):
                    refuse = partial(_raise_in_user_code, function, refused, name)
                    stack.enter_context(mock.patch.object(module, name, refuse))
        yield


def _raise_in_user_code(
    function: Any, error: Callable[[str], Exception], name: str, *args: Any, **kwargs: Any
) -> Any:
    if is_user_file(sys._getframe(1).f_code.co_filename):
        raise error(f"{function.__self__.__class__.__module__}.{name}")
    return function(*args, **kwargs)


@contextmanager
def _lossless() -> Iterator[None]:
    """Keep custom autograd.Functions; refuse what export would drop from the gradient silently."""

    def keep_function(cls: type[torch.autograd.Function], *args: Any) -> Any:
        if cls.__module__.startswith("torch._library"):  # an operator's registered derivative
            return functions.apply.__func__(cls, *args)
        source = user_source_line(traceback.extract_stack())
        if cls is CheckpointFunction:  # what is kept for backward is the pipeline's business
            run, _, *given = args
            return run(*given)
        if cls is BackwardHookFunction:
            raise _lost_hook("a backward hook of a module", source)
        try:
            return functions.record(cls, *args)
        except CaptureError as error:
            raise error.at(source) from None

    def refuse_hook(tensor: Tensor, hook: Any) -> Any:
        name = getattr(hook, "__qualname__", hook)
        source = user_source_line(traceback.extract_stack())
        raise _lost_hook(f"Tensor.register_hook({name!s})", source)

    enter: Any = torch.inference_mode.__enter__

    def refuse_inference(mode: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        if not is_user_file(caller):  # fake tensors use it for themselves
            return enter(mode)
        raise CaptureError(
            "inference mode inside the model: it would be lost in the captured graph",
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
            stack.enter_context(mock.patch.object(torch.autograd, name, partial(_derived, name)))
        yield


def _derived(name: str, *args: Any, **kwargs: Any) -> None:
    raise CaptureError(
        "the model takes gradients inside its forward: an exported graph has none",
        source=user_source_line(traceback.extract_stack()),
        found=f"torch.autograd.{name}",
        remedy="take them outside of the model, or write the derivative out",
    )


def _lost_hook(found: str, source: str | None) -> CaptureError:
    return CaptureError(
        "a hook on a tensor inside the model: it would be lost in the captured graph",
        source=source,
        found=found,
        remedy="remove the hook (module backward hooks count too), or apply the same change to"
        " the parameters' gradients after backward()",
    )


def _explain(error: Exception) -> CaptureError:
    """Say in one sentence what export says in pages."""
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
            remedy="compute both branches and choose with torch.where, or take the decision out of"
            f" the model and pass it in as a Python value; {OPTIONS}",
        )
    return CaptureError(
        "torch.export cannot capture the model",
        source=source,
        found=f"{kind}: {first}",
        remedy="see whether the model itself runs on these inputs; if so, make"
        " torch.export.export(model, args, kwargs, strict=False) work first (the error it raised is"
        " the cause of this one)",
    )
