"""Compile in one thread at a time, and patch torch for that thread only.

Tracing a model needs parts of torch, `random` or `logging` replaced, and torch's own tracers
replace some. Other threads may train or compile meanwhile. So compiling threads take turns, and
what `replaced` replaces acts as before in every other thread.
"""

from __future__ import annotations

import gc
import inspect
import os
import threading
from contextlib import contextmanager
from types import ClassMethodDescriptorType
from typing import TYPE_CHECKING, Any

from autopipe.interrupts import deferred, raise_deferred

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Turn:
    """Whose turn it is.

    Attributes:
        lock: of the thread that compiles.
    """

    lock = threading.RLock()


PATIENCE = 0.2
"""Seconds after which a waiting thread looks whether Ctrl-C was pressed."""

RARELY = (50_000, 10, 10)
"""Thresholds of the garbage collector while a model is compiled; see `gc.set_threshold`."""


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other thread compiles; Ctrl-C waits for a safe place until exit.

    Until exit, garbage is collected rarely: a trace makes objects by the hundred thousand and
    keeps them, and to look for garbage among them again and again takes a tenth of the time.
    """
    with deferred():
        turn = _Turn.lock  # a forked child has another
        while not turn.acquire(timeout=PATIENCE):
            raise_deferred()
        try:
            with _collect_rarely():
                yield
        finally:
            turn.release()


@contextmanager
def _collect_rarely() -> Iterator[None]:
    before = gc.get_threshold()
    if not 0 < before[0] < RARELY[0]:  # 0: the user collects
        yield
        return
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        if gc.get_threshold() == RARELY:
            gc.set_threshold(*before)


def _take_turns_anew() -> None:
    """In a forked process no other thread is left that could end its turn."""
    _Turn.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_take_turns_anew)


@contextmanager
def replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of a module, or a method of a class, in the current thread until exit.

    Args:
        owner: the module or class.
        name: of the function or method. A class method's replacement gets the class first.
        replacement: is called with the same arguments.
    """
    thread = threading.get_ident()
    missing = object()
    before = vars(owner).get(name, missing)  # missing: inherited, or a builtin
    original: Any = inspect.getattr_static(owner, name, replacement)
    of_class = isinstance(original, (classmethod, ClassMethodDescriptorType))
    if isinstance(original, classmethod):
        original = original.__func__
    active = True

    def call(*args: Any, **kwargs: Any) -> Any:
        function = replacement if active and threading.get_ident() == thread else original
        return function(*args, **kwargs)

    call.__name__ = name
    wrapper: Any = classmethod(call) if of_class else call
    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        active = False  # whoever kept the wrapper calls the original
        if vars(owner).get(name) is wrapper:  # else someone replaced it too, meanwhile
            if before is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
