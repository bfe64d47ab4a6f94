"""Functions that ask what is outside of the process's memory: clocks, files, threads."""

from __future__ import annotations

import contextlib
import datetime
import functools
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch

from autopipe.errors import CaptureError
from autopipe.passes.graph import is_standard_library, is_user_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

CLOCK = "time"
"""The module of clocks. (`datetime` is told by its classes.)"""

ASKING = frozenset({CLOCK, "posix", "nt", "_io", "io", "_thread", "_socket"})
"""Modules whose functions ask for something outside."""

PURE = frozenset(
    {"fspath", "text_encoding", "_path_normpath", "_path_splitroot", "_path_splitroot_ex"}
)
"""Functions of these modules that only compute: the name of a file."""

WAYS = frozenset(
    {"os", "posixpath", "ntpath", "genericpath", "pathlib", "glob", "shutil", "threading", "codecs"}
)
"""Files of Python's own library by way of which a model may ask."""

FROZEN = "<frozen "
"""How the file names begin of what is compiled into Python itself: ``<frozen posixpath>``."""

RANDOM_STATE = frozenset(
    {"manual_seed", "manual_seed_all", "seed", "seed_all", "fork_rng"}
    | {"get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all"}
)
GENERATOR_STATE = frozenset({"manual_seed", "seed", "get_state", "set_state", "initial_seed"})


def is_clock(function: Callable[..., Any]) -> bool:
    """Whether a function that is not written in Python tells the time."""
    if getattr(function, "__module__", None) == CLOCK:
        return function.__name__ != "sleep"
    owner = getattr(function, "__self__", None)
    is_date = isinstance(owner, type) and issubclass(owner, datetime.date)
    return is_date and function.__name__ in ("now", "today", "utcnow")


def asks_outside(function: Callable[..., Any]) -> bool:
    """Whether a function that is not written in Python asks for something outside."""
    if getattr(function, "__name__", "") in PURE:
        return False
    return getattr(function, "__module__", None) in ASKING or is_clock(function)


def asking_line(frame: FrameType | None) -> str | None:
    """The line of the user's code that asks, if it does so itself or by way of `WAYS`."""
    while frame is not None and (by := _library_file(frame.f_code.co_filename)) is not None:
        if by not in WAYS:
            return None  # logging asks for the time
        frame = frame.f_back
    if frame is None or not is_user_file(frame.f_code.co_filename):
        return None
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _library_file(file: str) -> str | None:
    """The name of a module of Python's own library, by its file; None for other files."""
    if file.startswith(FROZEN):
        return file.removeprefix(FROZEN).rstrip(">")
    if not is_standard_library(file):
        return None
    path = PurePath(file)
    private = path.stem.startswith("_") and path.parent.name in WAYS  # pathlib/_local.py
    return path.parent.name if private else path.stem


def name_of(function: Callable[..., Any]) -> str:
    """A function's name, for messages: ``time.time``."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}.{function.__name__}"
    module = {"posix": "os", "nt": "os", "_io": "io", "_thread": "threading"}
    found = getattr(function, "__module__", "") or ""
    return f"{module.get(found, found)}.{function.__name__}"


DECORATORS = (
    str(contextlib.__file__),
    *(str(PurePath(str(torch.__file__)).parent / n) for n in ("_compile.py", "_dynamo")),
)
"""Files whose functions stand between a decorated function and its caller."""


@functools.cache
def _random_codes() -> frozenset[CodeType]:
    """The functions of torch, written in Python, that read or set the state of random numbers."""
    modules = [torch.random, *filter(None, (getattr(torch.cuda, "random", None),))]
    found = [getattr(m, n, None) for m in modules for n in RANDOM_STATE]
    plain = [getattr(f, "__wrapped__", f) for f in found if f is not None]
    return frozenset(f.__code__ for f in plain if hasattr(f, "__code__"))


def refuse_random_state(frame: FrameType, function: Any = None) -> None:
    """Refuse a call of a function that reads or sets the state of torch's random numbers.

    Args:
        frame: the function, if it is written in Python; else of its caller.
        function: the function, if it is not.

    Raises:
        CaptureError: it is one, and the user's code calls it.
    """
    if function is None:
        if frame.f_code.co_name not in RANDOM_STATE or frame.f_code not in _random_codes():
            return
        name, caller = frame.f_code.co_name, frame.f_back
        while caller is not None and caller.f_code.co_filename.startswith(DECORATORS):
            caller = caller.f_back
    else:
        if function.__name__ not in GENERATOR_STATE:
            return
        name, caller = f"Generator.{function.__name__}", frame
    if caller is not None and is_user_file(caller.f_code.co_filename):
        raise CaptureError(
            "the forward reads or sets the state of torch's random numbers, which a captured graph"
            " does not repeat",
            source=f"{caller.f_code.co_filename}:{caller.f_lineno}",
            found=f"torch.{name}",
            remedy="call torch.manual_seed before the pipeline; a number that must be the same in"
            " every call is a buffer",
        )
