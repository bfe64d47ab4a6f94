"""Let Ctrl-C, and every other signal handler that raises, interrupt only where it is safe.

Python runs a signal handler between any two instructions of the main thread. An exception that it
raises there can leave a context manager entered, so that a patch, a grad mode or a running worker
outlives the call. Within `deferred`, handlers run as always, but their exceptions wait for the next
safe place: a call of `raise_deferred`, or the end.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from typing_extensions import Self

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals whose handlers users and their tools install."""


class _State:
    """What the main thread has deferred.

    Attributes:
        depth: number of `deferred` contexts that are active.
        pending: the exception of the last handler that raised.
        wake: called when a handler has raised; ends what the main thread waits for.
        is_waking: whether `wake` runs, which must not end half-way.
    """

    depth = 0
    pending: BaseException | None = None
    wake: Callable[[], None] | None = None
    is_waking = False


class _Deferring:
    """A signal handler that runs another one and keeps its exception.

    Attributes:
        original: the other one.
        leaving: it is about to be replaced by the other one again, and must still raise nothing.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.leaving = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        again = _State.pending is not None and not _State.is_waking
        try:
            self.original(signum, frame)
        except BaseException as error:
            if (
                _State.depth == 0 and not self.leaving
            ) or again:  # whoever asks twice does not want to wait
                raise
            waking, _State.is_waking = _State.is_waking, True
            _State.pending = error
            try:
                if _State.wake is not None and not waking:
                    _State.wake()
            finally:
                _State.is_waking = waking


class deferred:  # noqa: N801 (used like a function)
    """Context manager: exceptions of signal handlers wait for `raise_deferred`, or for its end.

    It does nothing in other threads: Python runs signal handlers in the main thread. A second
    exception, while one is waiting, is raised immediately, unless `wake` of `waking` runs just now.
    """

    def __enter__(self) -> Self:
        self._replaced: list[tuple[int, _Deferring]] = []
        self._counts = threading.current_thread() is threading.main_thread()
        if not self._counts:
            return self
        _State.depth += 1
        if _State.depth == 1:
            try:
                _State.pending = None  # one that was overtaken by another, at the last exit
                self._replace_handlers()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._counts:
            return
        self._counts = False
        for _, handler in self._replaced:
            handler.leaving = True
        _State.depth -= 1
        while self._replaced:
            try:
                self._restore_handlers()
            except BaseException as error:  # of a handler that is restored: restore the others too
                _State.pending = error
        if _State.depth == 0:
            _raise_pending()

    def _replace_handlers(self) -> None:
        for signum in SIGNALS:
            original: Any = signal.getsignal(signum)
            if callable(original):
                handler = _Deferring(original)
                self._replaced.append((signum, handler))  # before a handler may raise
                try:
                    signal.signal(signum, handler)
                except ValueError:  # not the main interpreter
                    return

    def _restore_handlers(self) -> None:
        while self._replaced:
            signum, handler = self._replaced[-1]
            current: Any = signal.getsignal(signum)
            if current is handler:  # else the user has set another one meanwhile
                signal.signal(signum, handler.original)
            handler.leaving = False  # whoever kept it: it passes everything on
            self._replaced.pop()


def is_deferred() -> bool:
    """Whether this is the main thread, and an exception waits."""
    return _State.pending is not None and threading.current_thread() is threading.main_thread()


def raise_deferred() -> None:
    """Raise the exception that waits, if any. Call it where an exception does no harm."""
    if is_deferred():
        _raise_pending()


def raise_interrupt() -> None:
    """Raise what waits if it is an interrupt: Ctrl-C, or an exit; no `Exception`.

    Call it where an error does no harm, but may be caught by others on its way: a timeout that a
    handler raises as an `Exception` waits for `raise_deferred`.
    """
    if _State.pending is not None and not isinstance(_State.pending, Exception):
        raise_deferred()


class waking:  # noqa: N801 (used like a function)
    """Context manager for a wait in the main thread: `wake` ends it when an exception waits.

    Args:
        wake: called within a signal handler, so it must not wait for a lock that the main thread
            may hold; at once if an exception is waiting already.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def __enter__(self) -> Self:
        self._counts = threading.current_thread() is threading.main_thread()
        if self._counts:
            self._before = _State.wake
            _State.wake = self._wake
            if _State.pending is not None:
                self._wake()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._counts:
            _State.wake = self._before


def _raise_pending() -> None:
    error, _State.pending = _State.pending, None
    if error is not None:
        raise error
