"""A device type whose streams and events write down what is asked of them.

It works on CPU tensors when it is registered as "cpu" (operators are synchronous, so values are
right whatever the streams do) and shows that the runtime asks for the right order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autopipe.runtime.backends import Backend


@dataclass(eq=False)
class RecordingEvent:
    """Behind the first `position` entries of a stream."""

    stream: RecordingStream
    position: int

    def synchronize(self) -> None:
        self.stream.backend.log.append(("host waits", self.stream.name))


@dataclass(eq=False)
class RecordingStream:
    """A stream; `entries` is what was queued in it, in order."""

    backend: RecordingBackend
    name: str
    entries: list[tuple[str, Any]] = field(default_factory=list)

    def record_event(self) -> RecordingEvent:
        event = RecordingEvent(self, len(self.entries))
        self.entries.append(("event", event))
        return event

    def wait_event(self, event: RecordingEvent) -> None:
        self.entries.append(("wait", event))

    def wait_stream(self, stream: RecordingStream) -> None:
        self.wait_event(stream.record_event())

    def waited_for(self) -> list[str]:
        """The streams that this one waited for, in order."""
        return [e.stream.name for what, e in self.entries if what == "wait"]


class RecordingBackend(Backend):
    """A device type with streams, of which only the book-keeping is real.

    Attributes:
        log: what was asked of the backend itself.
        streams: all that were made, by name ("stream 0", ... and "default").
    """

    def __init__(self, type: str = "cpu") -> None:
        super().__init__(type)
        self.log: list[tuple[str, Any]] = []
        self.streams = {"default": RecordingStream(self, "default")}
        self._thread = threading.local()

    def devices(self) -> tuple[torch.device, ...]:
        return (torch.device(self.type),)

    def find(self, device: torch.device) -> torch.device | None:
        return torch.device(self.type)

    def new_stream(self, device: torch.device) -> RecordingStream:
        name = f"stream {len(self.streams) - 1}"
        self.streams[name] = RecordingStream(self, name)
        return self.streams[name]

    def current_stream(self, device: torch.device) -> RecordingStream:
        found: RecordingStream = getattr(self._thread, "current", self.streams["default"])
        return found

    def default_stream(self, device: torch.device) -> RecordingStream:
        return self.streams["default"]

    @contextmanager
    def use_stream(self, stream: Any) -> Iterator[None]:
        before = self.current_stream(torch.device(self.type))
        self._thread.current = stream
        try:
            yield
        finally:
            self._thread.current = before

    def record_use(self, tensor: Tensor, stream: Any) -> None:
        stream.entries.append(("use", tensor))
