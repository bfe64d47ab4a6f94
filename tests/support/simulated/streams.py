"""Streams and events as vector clocks.

A clock says for each stream how many pieces of its work are certain to be done. A stream's clock is
what is certain when its next piece of work begins.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .machine import Machine


class Clock(dict["Stream", int]):
    """Stream → how many pieces of its work are certain to be done."""

    def merge(self, other: Mapping[Stream, int]) -> None:
        """Add what another clock is certain of."""
        for stream, ticks in other.items():
            if self.get(stream, 0) < ticks:
                self[stream] = ticks

    def knows(self, stream: Stream, tick: int) -> bool:
        """Whether a piece of work is certain to be done."""
        return self.get(stream, 0) >= tick


class Memory:
    """The allocator's memory for one stream, in bytes.

    What is freed while another stream uses it waits until the host knows that it is not used any
    more. A real host asks; here it knows only what it has waited for, as if devices were slow.

    Attributes:
        now: in use, or waiting.
        peak: the most so far.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._waiting: list[tuple[int, dict[Stream, int]]] = []

    def take(self, nbytes: int) -> None:
        """Allocate."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def give(self, nbytes: int, uses: dict[Stream, int], host: Clock) -> None:
        """Free what streams have used."""
        self._waiting.append((nbytes, uses))
        self.reclaim(host)

    def reclaim(self, host: Clock) -> None:
        """Take back what the host knows to be unused."""
        left = []
        for nbytes, uses in self._waiting:
            if all(host.knows(stream, tick) for stream, tick in uses.items()):
                self.now -= nbytes
            else:
                left.append((nbytes, uses))
        self._waiting = left


class Event:
    """A mark in a stream.

    Attributes:
        clock: what is certain once the mark is reached.
        time: virtual seconds at which it is reached.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream, self.clock, self.time = stream, Clock(stream.clock), stream.time

    def synchronize(self) -> None:
        """The calling thread waits for the mark."""
        self.stream.machine.host_waits(self)

    def query(self) -> bool:
        """Whether some thread of the host has waited for the mark, or for what comes after it."""
        known = self.stream.machine.host_knows
        return all(known.knows(stream, tick) for stream, tick in self.clock.items())


class Stream:
    """A queue of work on a device.

    Args:
        machine: where it is.
        device: its device.
        name: for messages.

    Attributes:
        time: virtual seconds at which the work queued so far ends.
        busy: virtual seconds of that work.
        freed: memory that was allocated for it and is free, but for those who may still use it.
        memory: how much was allocated for it.
    """

    def __init__(self, machine: Machine, device: torch.device, name: str) -> None:
        self.machine, self.device, self.name = machine, device, name
        self.clock = Clock()
        self.time = self.busy = 0.0
        self.freed: list[tuple[str, dict[Stream, tuple[int, str]]]] = []
        self.memory = Memory()
        self._ticks = 0

    def __repr__(self) -> str:
        return self.name

    def tick(self, seconds: float = 0.0) -> int:
        """Queue a piece of work; returns its number. It begins after the host has queued it."""
        host = self.machine.host
        self.clock.merge(host.clock)
        self._ticks += 1
        self.clock[self] = self._ticks
        self.time = max(self.time, host.time) + seconds
        self.busy += seconds
        return self._ticks

    def record_event(self, event: None = None) -> Event:
        """A mark after all work queued so far."""
        with self.machine.lock:
            return self.machine.recorded(Event(self))

    def wait_event(self, event: Event) -> None:
        """Later work here begins after the mark."""
        with self.machine.lock:
            self.clock.merge(event.clock)
            self.time = max(self.time, event.time)
            self.machine.waited(self, event)

    def wait_stream(self, stream: Stream) -> None:
        """Later work here begins after all work queued in `stream`."""
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        """The calling thread waits for all work queued so far."""
        self.record_event().synchronize()


class HostThread(threading.local):
    """What one host thread is certain of, and the streams that it works on.

    Args:
        machine: whose virtual time may begin anew.
    """

    def __init__(self, machine: Machine) -> None:
        self.clock = Clock()
        self._machine = machine
        self._time, self._rests = 0.0, machine.rests
        self.streams: dict[torch.device, Stream] = {}

    @property
    def time(self) -> float:
        """Virtual seconds at which the thread goes on; only waiting takes time."""
        return self._time if self._rests == self._machine.rests else 0.0

    @time.setter
    def time(self, seconds: float) -> None:
        self._time, self._rests = seconds, self._machine.rests
