"""Bounded queues between the workers of one step; a failure wakes all waiting workers."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Key = tuple[str, int, int]
"""(value, receiving stage, micro-batch)."""

Queue = tuple[str, int]
"""(value, receiving stage)."""


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

    Nothing is locked unless somebody waits. A queue has one sender and one receiver, and each
    counts for itself. Who waits says so, and then looks again; who changes something first changes
    it, and then looks for those who wait. So one of the two sees the other.
    """

    def __init__(self) -> None:
        self._messages: dict[Key, Any] = {}
        self._reserved: dict[Queue, int] = {}  # slots so far, by queue: written by its sender
        self._freed: dict[Queue, int] = {}  # likewise: written by its receiver
        self._changed = threading.Condition()
        self._waiting = 0
        self._aborted = self._all_know = False

    def reserve(self, key: Key, capacity: int) -> int:
        """Reserve a slot for a message; waits while the queue has no free one.

        Args:
            key: of the message.
            capacity: slots of its queue.

        Returns:
            How many messages of the queue were sent before it.

        Raises:
            AbortError: `abort` was called, before or meanwhile.
        """
        queue = key[:2]
        taken = self._reserved.get(queue, 0)
        if self._aborted or taken - self._freed.get(queue, 0) >= capacity:
            self._wait(lambda: taken - self._freed.get(queue, 0) < capacity)
        self._reserved[queue] = taken + 1
        return taken

    def put(self, key: Key, message: Any) -> None:
        """Store a message for which a slot was reserved.

        Raises:
            AbortError: `abort` was called.
        """
        self._messages[key] = message
        if self._aborted:  # perhaps since the messages were dropped
            self._messages.clear()
            raise AbortError
        self._wake()

    def take(self, key: Key) -> Any:
        """Wait for a message, remove it and free its slot.

        Raises:
            AbortError: `abort` was called, before or meanwhile.
        """
        if self._aborted or key not in self._messages:
            self._wait(lambda: key in self._messages)
        message = self._messages.pop(key, self)
        if message is self:  # dropped by `abort` just now
            raise AbortError
        queue = key[:2]
        self._freed[queue] = self._freed.get(queue, 0) + 1
        self._wake()
        return message

    def _wait(self, is_over: Callable[[], bool]) -> None:
        """Wait until a condition holds.

        Raises:
            AbortError: `abort` was called, before or meanwhile.
        """
        with self._changed:
            self._waiting += 1
            try:
                while not is_over() and not self._aborted:
                    self._changed.wait()
            finally:
                self._waiting -= 1
        if self._aborted:
            raise AbortError

    def _wake(self) -> None:
        """Let those who wait look again."""
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def abort(self) -> None:
        """Drop all messages and wake all workers; every later call raises `AbortError`."""
        if self._all_know:  # an interrupt of this call could leave the lock taken
            return
        self._aborted = True
        self._messages.clear()
        with self._changed:
            self._changed.notify_all()
        self._all_know = True
