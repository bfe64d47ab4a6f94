"""`StepRecording`: when each action of one run started, waited and ended.

Times are marks of a `Backend`: seconds of the host's clock, or events in a worker's stream, which
`Clock` turns into seconds after the run. So nothing waits for a device while a step runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .transfer import WorkerDevice


class Clock:
    """Puts the marks of one worker on the host's clock.

    For a device with streams, one mark is compared with the host's clock when the clock is made.
    The clocks of two devices then agree to some ten microseconds.

    Args:
        worker: whose marks.

    Attributes:
        device: of the worker.
    """

    def __init__(self, worker: WorkerDevice) -> None:
        self.device = worker.device
        self._backend, self._stream = worker.backend, worker.compute
        self._origin: Any = None
        self._started = 0.0
        if self._stream is not None:
            self._backend.synchronize(worker.device)
            self._origin = self._backend.mark(self._stream)
            self._backend.synchronize(worker.device)
            self._started = time.perf_counter()

    def mark(self) -> Any:
        """Mark when all work that the worker has queued is done."""
        return self._backend.mark(self._stream)

    def reader(self, first: Any) -> Callable[[Any], float]:
        """A function from a mark to seconds of the host's clock; it waits until that is reached.

        Args:
            first: the first mark of a step. Times within a step are exact to the resolution of
                events, however long ago the clock was made. The function reads all marks of the
                device, also those of other workers.
        """
        if self._stream is None:
            return float
        between = self._backend.seconds_between
        start = self._started + between(self._origin, first)
        return lambda mark: start + between(first, mark)


class RecordedTimes(NamedTuple):
    """One action of a run, in seconds of the host's clock.

    Attributes:
        function: the generated function that ran it, such as "forward_0".
        microbatch: which.
        start, end: when it ran.
        waits: (start, end) of each wait for a message, for space in a queue, or for a copy from the
            host of what was offloaded.
        arrived: when its last message had arrived; None: it received none.
        sent: when it began to send its last message; None: it sent none.
    """

    function: str
    microbatch: int
    start: float
    end: float
    waits: tuple[tuple[float, float], ...]
    arrived: float | None
    sent: float | None


@dataclass(eq=False)
class RecordedAction:
    """The marks of one action.

    Attributes:
        function, microbatch: as in `RecordedTimes`.
        clock: of the worker that runs it.
        start, end, waits, arrived, sent: marks; see `RecordedTimes`.
    """

    function: str
    microbatch: int
    clock: Clock
    start: Any
    end: Any = None
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    arrived: Any = None
    sent: Any = None

    def times(self, seconds: Callable[[Any], float]) -> RecordedTimes:
        """The marks in seconds.

        Args:
            seconds: from a mark to seconds.
        """
        return RecordedTimes(
            self.function,
            self.microbatch,
            seconds(self.start),
            seconds(self.end),
            tuple((seconds(start), seconds(end)) for start, end in self.waits),
            None if self.arrived is None else seconds(self.arrived),
            None if self.sent is None else seconds(self.sent),
        )


@dataclass(eq=False)
class StepRecording:
    """What one run did, by driver, in order.

    Attributes:
        rows: for each driver the actions that have ended.
        finished: the directions that have run to their end: "forward", "backward" or "step".
    """

    rows: list[list[RecordedAction]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def times(self) -> list[list[RecordedTimes]]:
        """For each driver its actions in seconds; waits until the devices have done them."""
        found, readers = [], dict[torch.device, Callable[[Any], float]]()
        for row in self.rows:
            for action in row[:1]:
                device = action.clock.device
                readers[device] = readers.get(device) or action.clock.reader(action.start)
            found.append([action.times(readers[action.clock.device]) for action in row])
        return found
