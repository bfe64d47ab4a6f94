"""Functions of torch that tell a forward about the process, not about tensors."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.backends import ContextProp

from autopipe.passes.graph import is_user_file

from .ambient import READABLE
from .value_keys import PLAIN, module_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

NAMED = ("is_", "get_", "has_", "current_")
"""How the names of such functions begin."""

OTHERS = {"initial_seed", "device_count", "__get__", "__getattr__"}

OF_PROCESS = ("torch.distributed", "torch.cuda", "torch.backends", "torch.accelerator")
"""Modules whose functions tell about the process also where they have arguments."""

HANDLED = {*READABLE, "is_anomaly_enabled", "is_anomaly_check_nan_enabled"}
"""Modes that `CallModes` compares, or that a capture switches off."""

TORCH = str(Path(torch.__file__).parent)


def question(frame: FrameType, answer: Any) -> tuple[Any, ...] | None:
    """The question that a function of torch answers as it returns to the user's code.

    Args:
        frame: of a function that returns.
        answer: what it returns.

    Returns:
        The function and its arguments; None if it is no such function.
    """
    code, caller = frame.f_code, frame.f_back
    name = code.co_name
    if not (name.startswith(NAMED) or name in OTHERS) or not code.co_filename.startswith(TORCH):
        return None
    if caller is None or not is_user_file(caller.f_code.co_filename) or not _is_plain(answer):
        return None
    owner = frame.f_locals.get("self")
    if name == "__get__":  # torch.backends.cudnn.benchmark
        return (owner.getter,) if isinstance(owner, ContextProp) else None
    if name == "__getattr__":  # torch.backends.cuda.matmul.allow_tf32
        known = module_name(type(owner)).startswith("torch.backends")
        return (getattr, owner, frame.f_locals.get("name")) if known else None
    function = inspect.unwrap(frame.f_globals.get(name, torch.is_tensor))
    if code.co_argcount and not frame.f_globals["__name__"].startswith(OF_PROCESS):
        return None  # `torch.is_tensor(3)` tells about its argument
    arguments = [frame.f_locals.get(n) for n in code.co_varnames[: code.co_argcount]]
    if getattr(function, "__code__", None) is not code or not all(map(_is_plain, arguments)):
        return None
    return function, *arguments


def builtin_question(function: Callable[..., Any]) -> tuple[Any, ...] | None:
    """The question that a function of torch's C code answers, if it needs no arguments."""
    name = getattr(function, "__name__", "")
    module = getattr(function, "__module__", None) or ""
    if name in HANDLED or not name.startswith(NAMED) or not module.startswith("torch"):
        return None
    try:
        return (function,) if _is_plain(function()) else None
    except Exception:  # it needs arguments
        return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, (*PLAIN, float))
