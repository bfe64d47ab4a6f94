"""`Backpressure`: senders wait for the devices of receivers.

The host may be far ahead of its devices. If it sent all messages of a step at once, each would be
in memory of its own: freed memory serves again only once the host knows that no stream uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backends import Event, Stream
    from .mailbox import Queue


class Backpressure:
    """By queue, marks in the receiver's stream: there it is done with the messages so far."""

    def __init__(self) -> None:
        self._marks: dict[Queue, list[Event]] = {}

    def mark(self, queue: Queue, compute: Stream | None) -> int:
        """Mark that a stage, about to receive a message, is done with those before it.

        Args:
            queue: of the message.
            compute: the stage's stream; None: its device has none, and nothing to mark.

        Returns:
            How many messages were received before it.
        """
        if compute is None:
            return 0
        marks = self._marks.setdefault(queue, [])
        marks.append(compute.record_event())
        return len(marks) - 1

    def wait(self, queue: Queue, earlier: int, most: int) -> None:
        """Wait until no more than `most` messages can be on the receiver's device with a new one.

        Args:
            queue: of the new message.
            earlier: how many messages were sent before it. The receiver has marked as many, less
                `most` - 1.
            most: at least 1. Messages that a stage saves for its backward are not counted.
        """
        marks = self._marks.get(queue)
        if marks and earlier > most - 1:
            marks[earlier - most + 1].synchronize()
