"""How far a sender may be ahead of its receiver's device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from autopipe.runtime.backpressure import Backpressure

QUEUE = ("x", 1)


@dataclass
class Stream:
    """Its events note that they are waited for."""

    waited: list[int] = field(default_factory=list)
    made: int = 0

    def record_event(self) -> Any:
        stream, number = self, self.made
        self.made += 1

        class Event:
            def synchronize(self) -> None:
                stream.waited.append(number)

        return Event()

    def wait_event(self, event: Any) -> None:
        raise AssertionError

    def wait_stream(self, stream: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_messages_than_allowed_are_on_the_device(most: int) -> None:
    """The n-th mark says that the messages before the n-th are not used any more."""
    stream, pressure = Stream(), Backpressure()
    for message in range(8):
        assert pressure.mark(QUEUE, stream) == message
        pressure.wait(QUEUE, message, most)
    # With message i there may be those from i - most + 1 on: the mark before it is reached.
    assert stream.waited == [i - most + 1 for i in range(most, 8)]


def test_queues_are_apart() -> None:
    stream, pressure = Stream(), Backpressure()
    for _ in range(5):
        pressure.mark(("y", 2), stream)
    pressure.wait(QUEUE, 4, 1)
    assert stream.waited == []


def test_a_device_without_streams_marks_nothing() -> None:
    pressure = Backpressure()
    assert pressure.mark(QUEUE, None) == 0
    pressure.wait(QUEUE, 5, 1)
