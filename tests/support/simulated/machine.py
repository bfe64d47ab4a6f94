"""The simulated machine: devices, streams, what went wrong, and how long it took."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch

from .blocks import Block
from .streams import Clock, Event, HostThread, Stream

TYPE = "lazy"

Cost = Callable[[Any, torch.device], float]


class Machine:
    """Some devices of type "lazy", and a host.

    Args:
        count: of the devices.
        cost: operator and device → the virtual seconds that it takes. Copies between devices cost
            what `aten._to_copy` costs.
        judge: is told of everything that happens; see `tests.support.simulated.judge`.

    Attributes:
        races: a line for each pair of accesses that nothing orders.
        counts: of kernels, copies, and the host's waits.
        host: the calling thread.
        capturing: stream → the graph that it captures.
        rests: how often virtual time has begun anew.
        host_knows: what some thread has waited for. What one thread queues comes after what it has
            waited for itself; memory of the host that one has waited for is given to others.
    """

    def __init__(
        self, count: int = 4, cost: Cost = lambda op, device: 0.0, judge: Any = None
    ) -> None:
        self.devices = tuple(torch.device(TYPE, k) for k in range(count))
        self.cost = cost
        self.lock = threading.RLock()
        self.races: list[str] = []
        self.counts: Counter[str] = Counter()
        self.judge = judge
        self.capturing: dict[Any, Any] = {}
        self._numbers = itertools.count(1)
        self._blocks = itertools.count(1)
        self._default: dict[torch.device, Stream] = {}
        self.rests = 0
        self.host = HostThread(self)
        self.host_knows = Clock()
        self._streams: list[Stream] = []
        for device in self.devices:
            self._default[device] = self._made(device, f"{device} default")

    def _made(self, device: torch.device, name: str) -> Stream:
        stream = Stream(self, device, name)
        self._streams.append(stream)
        if self.judge is not None:
            self.judge.stream(stream)
        return stream

    def next_block(self) -> int:
        return next(self._blocks)

    def new_stream(self, device: torch.device) -> Stream:
        """A stream that nothing orders with others."""
        with self.lock:
            return self._made(device, f"{device} stream {next(self._numbers)}")

    @cached_property
    def side_streams(self) -> dict[torch.device, Stream]:
        """A stream on each device for callers that do not work on the default ones."""
        return {d: self.new_stream(d) for d in self.devices}

    @cached_property
    def engine(self) -> ThreadPoolExecutor:
        """The thread in which autograd's engine runs a backward, the same one for each."""
        return ThreadPoolExecutor(1)

    def default_stream(self, device: torch.device) -> Stream:
        """The stream on which threads work that have chosen none."""
        return self._default[device]

    def current_stream(self, device: torch.device) -> Stream:
        """The stream that the calling thread works on."""
        return self.host.streams.get(device) or self._default[device]

    def set_stream(self, device: torch.device, stream: Stream | None) -> Stream | None:
        """Choose the calling thread's stream on a device; returns the one before."""
        before = self.host.streams.pop(device, None)
        if stream is not None:
            self.host.streams[device] = stream
        return before

    def host_waits(self, event: Event) -> None:
        """The calling thread waits until a mark is reached."""
        with self.lock:
            self.host.clock.merge(event.clock)
            self.host_knows.merge(event.clock)
            self.host.time = max(self.host.time, event.time)
            self.counts["host waits"] += 1
            if self.judge is not None:
                self.judge.host_waits(event)

    def synchronize(self, device: torch.device) -> None:
        """The calling thread waits for all work of a device."""
        for stream in [s for s in self._streams if s.device == device]:
            stream.synchronize()

    def recorded(self, event: Event) -> Event:
        if self.judge is not None:
            self.judge.recorded(event)
        return event

    def waited(self, stream: Stream, event: Event) -> None:
        if self.judge is not None:
            self.judge.waited(stream, event)

    def made(self, block: Block, stream: Stream, operator: str) -> None:
        if self.judge is not None:
            self.judge.made(block, stream, operator)

    def launched(
        self, stream: Stream | None, operator: str, tensors: Any, written: set[int]
    ) -> None:
        if self.judge is not None and stream is not None:
            self.judge.launched(stream, operator, tensors, written)

    def race(self, text: str) -> None:
        """Note what went wrong, once."""
        if text not in self.races:
            self.races.append(text)

    def rest(self) -> None:
        """Wait for everything; virtual time begins anew."""
        for device in self.devices:
            self.synchronize(device)
        for stream in self._streams:
            stream.time = stream.busy = 0.0
            stream.memory.reclaim(self.host_knows)
            stream.memory.peak = stream.memory.now
        self.rests += 1

    def forget(self) -> None:
        """Wait for everything, and forget what went wrong."""
        self.rest()
        self.races.clear()
        if self.judge is not None:
            self.judge.errors.clear()
        for stream in self._streams:
            stream.freed.clear()

    @property
    def makespan(self) -> float:
        """Virtual seconds until all work queued so far has ended."""
        return max(stream.time for stream in self._streams)
