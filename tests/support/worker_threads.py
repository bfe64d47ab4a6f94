"""Which threads a step leaves behind, and which a pipeline does."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Collection
from types import FrameType

from autopipe.runtime import worker_threads
from autopipe.runtime import workers as runtime_workers

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
        if t not in before and (t not in workers() or _works(frames.get(t.ident or 0)))
    ]


def _works(frame: FrameType | None) -> bool:
    """Whether a worker runs a task: it neither waits for one nor just ends."""
    return frame is not None and (
        frame.f_code.co_filename == runtime_workers.__file__ or _works(frame.f_back)
    )


def threads_left(before: Collection[threading.Thread]) -> list[str]:
    """Names of the threads that stay when all that was dropped is freed; they get time to end.

    Args:
        before: threads that do not count.
    """
    gc.collect()
    found = [t for t in threading.enumerate() if t not in before and t.is_alive()]
    deadline = time.monotonic() + LIMIT
    for thread in found:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [t.name for t in found if t.is_alive()]
