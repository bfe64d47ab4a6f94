"""Where workers leave tensors for one another: bounded, in order, and never a reason to hang."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

Key = tuple[str, int, int]
"""(what, for which stage, of which micro-batch)."""


def room(source: int, to: int) -> int:
    """How many messages of one kind may be on their way from one stage to another.

    A value for a stage that is n further waits n steps there even where all are punctual; one more
    lets a stage be early. That is all that a step's memory has to be laid out for.
    """
    return abs(to - source) + 1


class AbortError(Exception):
    """Another worker has failed; whoever waits gives up."""


class Mailbox:
    """Messages between the workers of one step.

    A sender asks for room before it makes the message: what cannot be let in is not on the
    receiver's device either. A stage consumes a kind in the order in which it is sent, so any room
    from one on is free of deadlock.
    """

    def __init__(self) -> None:
        self._messages: dict[Key, Any] = {}
        self._coming: Counter[tuple[str, int]] = Counter()
        self._changed = threading.Condition()
        self._aborted = False

    def reserve(self, key: Key, room: int) -> None:
        """Announce a message; waits while `room` of its kind are announced and not yet taken."""
        kind = key[:2]
        with self._changed:
            while self._coming[kind] >= room and not self._aborted:
                self._changed.wait()
            if self._aborted:
                raise AbortError
            self._coming[kind] += 1

    def put(self, key: Key, message: Any) -> None:
        """Leave a message for which room was reserved."""
        with self._changed:
            if self._aborted:
                raise AbortError
            self._messages[key] = message
            self._changed.notify_all()

    def take(self, key: Key) -> Any:
        """Remove a message; waits until it is there."""
        with self._changed:
            while key not in self._messages and not self._aborted:
                self._changed.wait()
            if self._aborted:
                raise AbortError
            self._coming[key[:2]] -= 1
            message = self._messages.pop(key)
            self._changed.notify_all()
            return message

    def abort(self) -> None:
        """Wake everybody; every call from now on raises `AbortError`."""
        with self._changed:
            self._aborted = True
            self._messages.clear()
            self._changed.notify_all()
