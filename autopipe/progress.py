"""A progress bar for compiling, shown on a terminal after one second."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm


def silent(text: str) -> None:
    """Report no progress."""


class _Bar(tqdm):  # type: ignore[type-arg]
    """tqdm without its monitor thread, which would never end."""

    monitor_interval = 0


class _NoBar:
    """What of a bar is used, without a terminal."""

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        pass

    def update(self) -> None:
        pass

    def close(self) -> None:
        pass


class Progress:
    """A bar on a terminal once compiling takes longer than a second; elsewhere nothing.

    Args:
        stages: number of stages that may be traced.
    """

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, text: str) -> None:
        try:
            if self._bar is None:
                self._bar = self._opened()
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        except (OSError, ValueError):  # the terminal is gone, or stderr was closed
            self._bar = _NoBar()

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.close()

    def _opened(self) -> Any:
        if sys.stderr is None:  # in a program without streams
            return _NoBar()
        return _Bar(
            total=4 + self._stages,
            desc="autopipe",
            delay=1,
            disable=None,
            leave=False,
            file=sys.stderr,
        )
