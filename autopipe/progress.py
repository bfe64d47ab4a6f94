"""Show the progress of compiling once it takes longer than a second.

On a terminal it is a bar, which goes away at the end. Elsewhere, such as in a log file, it is a
line for each step that is under way when a second has passed. A thread writes both, because a step
may take minutes; it ends when compiling ends.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from time import perf_counter
from typing import Any

from tqdm import tqdm

DELAY = 1.0
"""Seconds until something is shown, and between looks at what to show."""


def silent(text: str) -> None:
    """Report no progress."""


class _Unlocked:
    """A lock that never locks."""

    def acquire(self, *args: object, **kwargs: object) -> bool:
        return True

    def release(self) -> None:
        """Nothing is locked."""

    def __enter__(self) -> None:
        """Nothing is locked."""

    def __exit__(self, *_: object) -> None:
        """Nothing is locked."""


class _Bar(tqdm):  # type: ignore[type-arg]
    """tqdm without its monitor thread, which would never end, and without its lock.

    If the terminal is gone, tqdm fails while it holds the lock of all bars of the process, and does
    not release it. The next one that makes a bar, such as torch's `Interpreter`, would wait for
    ever. A bar of one thread needs no lock.
    """

    monitor_interval = 0


_Bar.set_lock(_Unlocked())


class Progress:
    """What compiling is doing, shown if it takes longer than a second.

    Args:
        stages: number of stages that may be traced.
    """

    def __init__(self, stages: int) -> None:
        self._steps = 4 + stages
        self._done = 0
        self._text = ""
        self._start = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, text: str) -> None:
        self._text = text
        self._done += 1
        if self._thread is None:
            self._start = perf_counter()
            self._thread = threading.Thread(
                target=self._show, name="autopipe-progress", daemon=True
            )
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()

    def _show(self) -> None:
        if self._ended.wait(DELAY) or sys.stderr is None:  # None: in a program without streams
            return
        with suppress(OSError, ValueError):  # the terminal is gone, or stderr was closed
            if sys.stderr.isatty():
                self._show_bar()
            else:
                self._write_lines()

    def _show_bar(self) -> None:
        bar: Any = _Bar(total=self._steps, desc="autopipe", leave=False, file=sys.stderr)
        # A new pseudo-terminal may have no size, where tqdm would show nothing.
        if (bar.ncols or 0) <= 0:
            bar.ncols, bar.nrows = 80, 24
        try:
            while True:
                bar.set_postfix_str(self._text, refresh=False)
                bar.n = self._done - 1  # the last one is under way
                bar.refresh()
                if self._ended.wait(DELAY):
                    return
        finally:
            bar.close()

    def _write_lines(self) -> None:
        written = -1
        while True:
            done, text = self._done, self._text
            if done != written:
                seconds = perf_counter() - self._start
                sys.stderr.write(f"autopipe: {text} (step {done}, after {seconds:.0f} s)\n")
                sys.stderr.flush()
                written = done
            if self._ended.wait(DELAY):
                break
        sys.stderr.write(f"autopipe: compiled in {perf_counter() - self._start:.1f} s\n")
        sys.stderr.flush()
