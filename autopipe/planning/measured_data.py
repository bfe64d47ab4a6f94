"""The data of measured steps, and what is computed from them: medians, predictions to compare."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

from autopipe.errors import OptionError

from .measured_timeline import waited_transfers

if TYPE_CHECKING:
    from autopipe.passes.schedule import Scheduled, Timeline
    from autopipe.planning.measured_timeline import Transfer
    from autopipe.planning.plans import Plan


@dataclass(frozen=True)
class MeasuredSteps:
    """Steps of one program that were measured.

    Attributes:
        plan: the program's plan, whose times are predicted.
        scheduled: what its devices run.
        ops: for each stage, names of the captured ops that it computes.
        steps: a timeline each, in seconds.
    """

    plan: Plan
    scheduled: Scheduled
    ops: tuple[tuple[str, ...], ...]
    steps: tuple[Timeline, ...]


class MeasuredData:
    """What `Measured` computes.

    Attributes:
        others: measured steps of other programs (another mode, batch size or structure of inputs)
            than the one that ran most often; they are left out.
        unfinished: calls that are left out since their backward did not run while the profile was
            open, or failed.
        earlier: the measured steps that the pipeline's plan was made with; None: there are none.
    """

    def __init__(self, earlier: MeasuredData | None = None) -> None:
        self.earlier = earlier
        self._found: MeasuredSteps | None = None
        self.others, self.unfinished = 0, 0

    @property
    def found(self) -> MeasuredSteps:
        """The measured steps, with the program that ran.

        Raises:
            OptionError: there are none.
        """
        if self._found is None:
            calls = f"{self.unfinished} calls without their backward" if self.unfinished else None
            raise OptionError(
                "no step was measured",
                expected="at least one whole step within the `with` block, which has ended",
                found=calls,
                remedy="with pipe.profile() as measured: pipe(x).sum().backward()",
            )
        return self._found

    @property
    def steps(self) -> tuple[Timeline, ...]:
        """The measured steps, each a `Timeline` in seconds; empty if there are none."""
        return () if self._found is None else self._found.steps

    @property
    def plan(self) -> Plan:
        """The plan of the program that ran, with predicted times.

        Raises:
            OptionError: nothing was measured. (So do all properties below.)
        """
        return self.found.plan

    @cached_property
    def timeline(self) -> Timeline:
        """The step whose length is the median (of an even number, the shorter one)."""
        ordered = sorted(self.found.steps, key=lambda line: line.makespan)
        return ordered[(len(ordered) - 1) // 2]

    @property
    def step_seconds(self) -> float:
        """Length of the median step, from the start of its first action to the end of its last."""
        return self.timeline.makespan

    @property
    def pause_seconds(self) -> float:
        """Median time of the caller between the passes of a step; 0 if a step is one pass."""
        return median(line.pause_length for line in self.found.steps)

    @property
    def bubble(self) -> float:
        """Median idle share of the pipeline's time, as `Timeline.bubble`, without the caller's."""
        return median(line.bubble for line in self.found.steps)

    @cached_property
    def phase_seconds(self) -> tuple[dict[str, float], ...]:
        """For each stage, by phase ("F", "RBW" …), median seconds that an action computes.

        Time that it waits for messages does not count. Of micro-batches of the largest size.
        """
        largest = max(self.plan.sizes)
        rows = ({p: t for (p, s), t in row.items() if s == largest} for row in self._seconds)
        return tuple(rows)

    @cached_property
    def _seconds(self) -> tuple[dict[tuple[str, int], float], ...]:
        """For each stage, by phase and size of the micro-batch, median seconds of computing."""
        sizes = self.plan.sizes
        found: list[dict[tuple[str, int], list[float]]] = [
            defaultdict(list) for _ in self.plan.stages
        ]
        for line in self.found.steps:
            for row in line.spans:
                for span in row:
                    a = span.action
                    found[a.stage][a.phase, sizes[a.microbatch]].append(span.busy)
        return tuple({key: median(times) for key, times in stage.items()} for stage in found)

    @property
    def bottleneck(self) -> float:
        """Seconds that the slowest stage computes for one micro-batch (the largest), all phases."""
        return max(sum(phases.values()) for phases in self.phase_seconds)

    @cached_property
    def transfers(self) -> dict[Transfer, float]:
        """Median seconds of transfers between devices, by (phase that sends, its stage, to stage).

        A time from sending until the receiver, which waited, goes on: copy, and waking up. Where no
        receiver waited there is none.
        """
        found: dict[Transfer, list[float]] = defaultdict(list)
        for line in self.found.steps:
            for key, seconds in waited_transfers(self.found.scheduled, line):
                found[key].append(seconds)
        return {key: median(times) for key, times in sorted(found.items())}

    @cached_property
    def predicted(self) -> Timeline:
        """The plan's timeline of what ran: simulated with predicted times."""
        return self.plan.simulated(self.found.scheduled)

    @cached_property
    def simulated(self) -> Timeline:
        """The timeline simulated with the measured times of phases, and predicted transfers.

        What the measured step takes longer than this is not the phases' own time: uneven actions,
        workers that start late, devices that wait for one another, and the caller's pause.
        """
        sizes, seconds = self.plan.sizes, self._seconds
        return self.plan.simulated(
            self.found.scheduled, lambda phase, stage, m: seconds[stage][phase, sizes[m]]
        )
