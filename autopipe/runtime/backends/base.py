"""`Backend`: what the runtime asks of a device type."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

T = TypeVar("T")


class Event(Protocol):
    """A mark in a stream: the part of `torch.Event` that the runtime uses."""

    def synchronize(self) -> None:
        """Block the calling thread until the stream has reached the mark."""

    def query(self) -> bool:
        """Whether the stream has reached the mark."""


class Stream(Protocol):
    """A queue of work on a device: the part of `torch.Stream` that the runtime uses."""

    def record_event(self) -> Any:
        """Record an `Event` after all work queued so far."""

    def wait_event(self, event: Any) -> None:
        """Make later work wait for `event`, of any stream of this device type."""

    def wait_stream(self, stream: Any) -> None:
        """Make later work wait for all work that is now queued in `stream`."""


class Graph(Protocol):
    """Work that is captured once and replayed: the part of `torch.cuda.CUDAGraph` that is used."""

    def register_generator_state(self, generator: Any) -> None:
        """Let captured operators draw from a generator, in its state at each replay.

        Args:
            generator: of the device; registered before the capture.
        """

    def replay(self) -> None:
        """Queue the captured work in the calling thread's current stream."""


class GraphPool(Protocol):
    """Makes graphs that may use what earlier ones have freed: they run in the captures' order."""

    def new_graph(self) -> Any:
        """A graph that has captured nothing."""

    def capturing(self, graph: Any) -> AbstractContextManager[Any]:
        """Capture the calling thread's operators while the context is open; they do not run."""

    def drawing_from(self, generator: torch.Generator) -> AbstractContextManager[Any]:
        """While capturing, let operators that take no generator draw from one that is registered.

        Args:
            generator: registered with the graph.
        """


class Backend:
    """The devices of one type.

    This class itself describes a synchronous type: an operator has finished when its call returns,
    there are no streams, and no waiting is needed. A type with streams overrides all methods of the
    second group.

    Args:
        type: as in ``torch.device(type)``.
    """

    def __init__(self, type: str) -> None:
        self.type = type

    @property
    def autocast_type(self) -> str | None:
        """What `torch.autocast` calls these devices; None: it does not know them."""
        return self.type if torch.amp.is_autocast_available(self.type) else None

    @property
    def blocking_launches(self) -> str | None:
        """What to set in the environment so that an error is reported by the op that failed."""
        return None

    # Which devices there are

    def devices(self) -> tuple[torch.device, ...]:
        """All devices of this type on which a worker can run here, with their indices."""
        return ()

    def find(self, device: torch.device) -> torch.device | None:
        """Add the index to a device that a user named.

        Args:
            device: of this type; its index may be missing.

        Returns:
            The device with its index; None if there is no such device here.
        """
        return None

    def name(self, device: torch.device) -> str:
        """Name the model of a device and anything else that its speed depends on."""
        return device.type

    # Streams

    def new_stream(self, device: torch.device) -> Stream | None:
        """A new stream on a device; None: this type has no streams."""
        return None

    def current_stream(self, device: torch.device) -> Stream | None:
        """The stream on which the calling thread's operators run."""
        return None

    def default_stream(self, device: torch.device) -> Stream | None:
        """The stream on which operators run by default."""
        return None

    def use_stream(self, stream: Stream) -> AbstractContextManager[Any]:
        """Run the calling thread's operators on `stream` while the context is open."""
        raise NotImplementedError(f"{self.type} has no streams")

    def use_device(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make `device` the calling thread's current device while the context is open."""
        return nullcontext()

    def record_use(self, tensor: Tensor, stream: Stream) -> None:
        """Keep a tensor's memory from being reused before the work now in `stream` is done."""
        raise NotImplementedError(f"{self.type} has no streams")

    def synchronize(self, device: torch.device) -> None:
        """Block the calling thread until a device has done all its work."""

    # Graphs

    def new_capture_stream(self, device: torch.device) -> Stream | None:
        """A stream for the captures of one worker and for nothing else; None: no graphs here."""
        return None

    def new_graph_pool(self, device: torch.device, stream: Stream) -> GraphPool:
        """What captures graphs that use the same memory.

        Args:
            device: of the graphs.
            stream: from `new_capture_stream`.
        """
        raise NotImplementedError(f"{self.type} has no graphs")

    # Random numbers

    def default_generator(self, device: torch.device) -> torch.Generator:
        """The generator that operators draw from when they are given none."""
        return torch.default_generator

    def new_generator(self, device: torch.device) -> torch.Generator:
        """A generator of random numbers for operators on a device."""
        return torch.Generator(device)

    def fork_rng(self, device: torch.device) -> AbstractContextManager[Any]:
        """Restore the default generators (CPU and `device`) when the context closes."""
        return torch.random.fork_rng(devices=[])

    # Timing

    def timed(self, device: torch.device, run: Callable[[], T]) -> tuple[T, float]:
        """Run a function whose operators work on a device.

        Args:
            device: of this type.
            run: the function.

        Returns:
            Its result and the seconds that the device took for it.
        """
        start = time.perf_counter()
        result = run()
        return result, time.perf_counter() - start

    def mark(self, stream: Stream | None) -> Any:
        """Mark a point in time: when all work now queued in `stream` is done. (Here: now.)

        Args:
            stream: of a device of this type; None where there are no streams.

        Returns:
            For `seconds_between`; in this class, seconds on the host's clock.
        """
        return time.perf_counter()

    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to another of the same device; waits until both are reached.

        Args:
            first, second: what `mark` returned.
        """
        elapsed: float = second - first
        return elapsed
