"""Watch the Python functions that a model's forward calls: what they can read, what they draw.

`sys.setprofile` reports every call in the current thread. The watch sleeps within torch's functions
(`asleep`), which are most of a forward.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
import sys
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint

from autopipe.passes.graph import is_standard_library, is_user_file

from .kinds import is_import
from .outside_world import asking_line, asks_outside, is_clock, name_of, refuse_random_state
from .questions import builtin_question, question
from .random_numbers import numpy_refused, random_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from .ambient import CallModes
    from .reachable import ReachableState

DRAWING = ("random", "getrandbits")
"""The methods of `random.Random` that are not written in Python."""


READ_ENVIRONMENT = type(os.environ).__getitem__.__code__
CHECKPOINT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__
TENSOR_HASH = torch.Tensor.__hash__.__code__
MODES = {f for f in vars(torch).values() if isinstance(f, types.BuiltinFunctionType)}
CALLS = (types.FunctionType, types.MethodType, functools.partial)


class CallWatch:
    """Tells a `ReachableState` of each call, and refuses Python's random numbers.

    Args:
        state: of the model that is called.
        modes: of the call that the model is captured for.
    """

    def __init__(self, state: ReachableState, modes: CallModes) -> None:
        self._state, self._modes = state, modes
        self._awake = False
        self._import: FrameType | None = None  # the code of the outermost module being imported

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until exit. If a profiler is at work already, nothing is watched.

        Raises:
            CaptureError: a random number that is not torch's is drawn.
        """
        if sys.getprofile() is not None:
            yield
            return
        with numpy_refused():
            self._awake = self._state.is_watched = True
            sys.setprofile(self._called)
            try:
                yield
            finally:
                sys.setprofile(None)
                self._awake = False

    def asleep(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of torch, unwatched unless it may call a function of the user."""
        if not self._awake or any(isinstance(x, CALLS) for x in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        sys.setprofile(None)
        self._awake = False
        try:
            return function(*args, **kwargs)
        finally:
            self._awake = True
            sys.setprofile(self._called)

    def _called(self, frame: FrameType, event: str, function: Any) -> None:
        if self._import is not None:  # what is done there is done once, by whoever imports first
            if event == "return" and frame is self._import:
                self._import = None
        elif event == "call" and is_import(frame):
            self._import = frame
        elif event == "call":
            self._entered(frame)
        elif event == "return":
            if (asked := question(frame, function)) is not None:
                self._state.noted.note_answer(asked, function)
        elif event == "c_call":
            self._called_builtin(frame, function)

    def _entered(self, frame: FrameType) -> None:
        code = frame.f_code
        if _is_watched(code.co_filename):
            self._state.enter(frame)
        elif code is READ_ENVIRONMENT:
            self._state.noted.note_variable(str(frame.f_locals["key"]))
        elif code is CHECKPOINT:
            self._state.noted.note_checkpoint(_users_line(frame.f_back))
        elif code is TENSOR_HASH:
            self._state.noted.arguments.add("identity")
        else:
            refuse_random_state(frame)

    def _called_builtin(self, frame: FrameType, function: Any) -> None:
        if isinstance(getattr(function, "__self__", None), torch.Generator):
            refuse_random_state(frame, function)
        elif function in MODES and is_user_file(frame.f_code.co_filename):
            self._modes.note(function, f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if (asked := builtin_question(function)) is not None:
                self._state.noted.note_answer(asked, function())
        elif function is print and is_user_file(frame.f_code.co_filename):
            self._state.noted.note_print(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        elif _draws(function):
            user = _user_frame(frame)
            if user is not None:
                raise random_error(
                    f"{type(function.__self__).__module__}.{function.__name__}",
                    f"{user.f_code.co_filename}:{user.f_lineno}",
                )
        elif asks_outside(function) and (line := asking_line(frame)) is not None:
            self._state.noted.note_outside(name_of(function), line, clock=is_clock(function))


@functools.cache
def _is_watched(file: str) -> bool:
    return is_user_file(file) and not is_standard_library(file)


def _draws(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    if name == "urandom":
        return getattr(function, "__module__", "") in ("posix", "nt")
    return name in DRAWING and isinstance(getattr(function, "__self__", None), random.Random)


def _users_line(frame: FrameType | None) -> str:
    """The line of the nearest caller that is the user's."""
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """The first caller outside of Python's own library, if it is the user's."""
    while frame is not None and is_standard_library(frame.f_code.co_filename):
        if frame.f_code.co_filename.endswith("tempfile.py"):  # for the name of a file
            return None
        frame = frame.f_back
    return frame if frame is not None and is_user_file(frame.f_code.co_filename) else None
