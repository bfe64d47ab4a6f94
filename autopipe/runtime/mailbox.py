"""Where workers leave tensors for one another: bounded, in order, and never a reason to hang."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

Key = tuple[str, int, int]
"""(what, for which stage, of which micro-batch)."""


class AbortError(Exception):
    """Another worker has failed; whoever waits gives up."""


class Mailbox:
    """Messages between the workers of one step.

    Args:
        capacity: how many messages of one kind may wait at one stage before their sender waits.
            A stage consumes a kind in the order in which it is sent, so any capacity ≥ 1 is free of
            deadlock; with the number of stages, nobody waits without need.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._messages: dict[Key, Any] = {}
        self._waiting: Counter[tuple[str, int]] = Counter()
        self._changed = threading.Condition()
        self._aborted = False

    def put(self, key: Key, message: Any) -> None:
        """Leave a message; waits while too many of its kind lie there."""
        kind = key[:2]
        with self._changed:
            while self._waiting[kind] >= self._capacity and not self._aborted:
                self._changed.wait()
            if self._aborted:
                raise AbortError
            self._messages[key] = message
            self._waiting[kind] += 1
            self._changed.notify_all()

    def take(self, key: Key) -> Any:
        """Remove a message; waits until it is there."""
        with self._changed:
            while key not in self._messages and not self._aborted:
                self._changed.wait()
            if self._aborted:
                raise AbortError
            self._waiting[key[:2]] -= 1
            message = self._messages.pop(key)
            self._changed.notify_all()
            return message

    def abort(self) -> None:
        """Wake everybody; every call from now on raises `AbortError`."""
        with self._changed:
            self._aborted = True
            self._messages.clear()
            self._changed.notify_all()
