"""`RecordedRun`: a `Run` that records when each action starts, waits and ends."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from .actions import with_wrapped_actions
from .executor import Run
from .mailbox import Mailbox
from .recording import RecordedAction, StepRecording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from .mailbox import Key
    from .recording import Clock
    from .transfer import WorkerDevice


@dataclass(eq=False)
class RecordedRun(Run):
    """A run of which `recording` tells when its actions ran.

    Args:
        clocks: of each worker.
        recording: where to write it.
    """

    clocks: Mapping[WorkerDevice, Clock] = field(kw_only=True)
    recording: StepRecording = field(default_factory=StepRecording, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._thread = threading.local()

    def execute(self, direction: str) -> None:
        super().execute(direction)
        self.recording.finished.append(direction)

    def _functions(self, direction: str) -> Sequence[Callable[[Any], None]]:
        rows, drivers = self.recording.rows, self.program.drivers
        rows += [[] for _ in range(len(rows), len(drivers))]
        functions = zip(super()._functions(direction), drivers, rows, strict=True)
        return [
            with_wrapped_actions(f, partial(self._action, self.clocks[w], row))
            for f, w, row in functions
        ]

    def _action(
        self, clock: Clock, row: list[RecordedAction], name: str, function: Callable[..., None]
    ) -> Callable[..., None]:
        def recorded(run: Run, m: int, compute: Any) -> None:
            action = self._thread.action = RecordedAction(name, m, clock, clock.mark())
            function(run, m, compute)
            action.end = clock.mark()
            row.append(action)

        return recorded

    def _new_mailbox(self) -> Mailbox:
        return _RecordedMailbox(self)

    def receive(self, value: str, stage: int, m: int) -> Tensor:
        """As `Run.receive`; what another stage sends is waited for."""
        if (value, stage, m) in self.inputs:  # from the caller: part of the action's work
            return super().receive(value, stage, m)
        with self.waiting() as action:
            tensor = super().receive(value, stage, m)
        action.arrived = action.waits[-1][1]
        return tensor

    def pop_saved(self, stage: int, m: int) -> list[Tensor]:
        """As `Run.pop_saved`; copies back from the host are waited for."""
        if not self.program.offloaded.get((self.program.sizes[m], stage)):
            return super().pop_saved(stage, m)
        with self.waiting():
            return super().pop_saved(stage, m)

    @contextmanager
    def waiting(self) -> Iterator[RecordedAction]:
        """Record that the thread's action waits while the context is open."""
        action: RecordedAction = self._thread.action
        start = action.clock.mark()
        yield action
        action.waits.append((start, action.clock.mark()))


class _RecordedMailbox(Mailbox):
    """Records waits for space, after which a message is sent."""

    def __init__(self, run: RecordedRun) -> None:
        super().__init__()
        self._run = run

    def reserve(self, key: Key, capacity: int) -> int:
        with self._run.waiting() as action:
            earlier = super().reserve(key, capacity)
        action.sent = action.waits[-1][1]
        return earlier
