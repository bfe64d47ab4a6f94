"""Which threads a step leaves behind, and which a pipeline does."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Collection

from autopipe.runtime import worker_threads

LIMIT = 10.0
"""Seconds within which a thread must end that has nothing to do."""


def workers() -> list[threading.Thread]:
    """The threads of all pipelines."""
    return [t for t in threading.enumerate() if isinstance(t, worker_threads._Thread)]


def busy_threads(before: Collection[threading.Thread] = ()) -> list[threading.Thread]:
    """The threads that a step has left behind: all but workers that wait for a task.

    Args:
        before: threads that do not count.
    """
    frames = sys._current_frames()
    return [
        t
        for t in threading.enumerate()
        if t not in before and not (t in workers() and _waits(frames.get(t.ident or 0)))
    ]


def _waits(frame: object) -> bool:
    """Whether a worker runs none of a step's code: it is in its own loop."""
    return frame is None or frame.f_code.co_filename == worker_threads.__file__  # type: ignore[attr-defined]


def threads_left(before: Collection[threading.Thread]) -> list[str]:
    """Names of the threads that stay when all that was dropped is freed; they get time to end.

    Args:
        before: threads that do not count.
    """
    gc.collect()
    found = [t for t in threading.enumerate() if t not in before]
    deadline = time.monotonic() + LIMIT
    for thread in found:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [t.name for t in found if t.is_alive()]
