"""Bounded queues between the workers of one step; a failure wakes all waiting workers."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

Key = tuple[str, int, int]
"""(value, receiving stage, micro-batch)."""


def queue_capacity(source: int, to: int) -> int:
    """The number of micro-batches of one value that may be in transit between two stages.

    A value for a stage n stages away is queued for n micro-batches even if no stage is late; one
    more slot lets the sender run ahead. Memory estimates rely on this bound.

    Args:
        source: the stage that sends.
        to: the stage that receives, earlier or later in the pipeline.

    Returns:
        The number of messages, at least 1.
    """
    return abs(to - source) + 1


class AbortError(Exception):
    """Another worker has failed: stop waiting."""


class Mailbox:
    """Messages between the workers of one step, one queue for each (value, receiving stage).

    A sender reserves a slot before it copies the tensor, so no more tensors than the capacity are
    on the receiver's device. A stage reads the messages of a queue in the order in which they are
    sent, so any capacity of at least 1 is free of deadlocks.
    """

    def __init__(self) -> None:
        self._messages: dict[Key, Any] = {}
        self._reserved: Counter[tuple[str, int]] = Counter()  # slots in use, by queue
        self._changed = threading.Condition()
        self._aborted = False

    def reserve(self, key: Key, capacity: int) -> None:
        """Reserve a slot for a message; waits while the queue has no free one.

        Args:
            key: of the message.
            capacity: slots of its queue.

        Raises:
            AbortError: `abort` was called, before or meanwhile.
        """
        queue = key[:2]
        with self._changed:
            while self._reserved[queue] >= capacity and not self._aborted:
                self._changed.wait()
            if self._aborted:
                raise AbortError
            self._reserved[queue] += 1

    def put(self, key: Key, message: Any) -> None:
        """Store a message for which a slot was reserved.

        Raises:
            AbortError: `abort` was called.
        """
        with self._changed:
            if self._aborted:
                raise AbortError
            self._messages[key] = message
            self._changed.notify_all()

    def take(self, key: Key) -> Any:
        """Wait for a message, remove it and free its slot.

        Raises:
            AbortError: `abort` was called, before or meanwhile.
        """
        with self._changed:
            while key not in self._messages and not self._aborted:
                self._changed.wait()
            if self._aborted:
                raise AbortError
            self._reserved[key[:2]] -= 1
            message = self._messages.pop(key)
            self._changed.notify_all()
            return message

    def abort(self) -> None:
        """Drop all messages and wake all workers; every later call raises `AbortError`."""
        with self._changed:
            self._aborted = True
            self._messages.clear()
            self._changed.notify_all()
