"""A progress bar for compiling, shown on a terminal after one second."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def silent(text: str) -> None:
    """Report no progress."""


class _Bar(tqdm):  # type: ignore[type-arg]
    """tqdm without its monitor thread, which would never end."""

    monitor_interval = 0


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
        if self._bar is None:
            self._bar = _Bar(
                total=4 + self._stages,
                desc="autopipe",
                delay=1,
                disable=None,
                leave=False,
                file=sys.stderr,
            )
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
