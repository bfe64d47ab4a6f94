"""How a model would be cut and what each device would do, before anything runs.

Today's plan takes devices, chunks, schedule and rematerialization as given, balances the cut by the
cost pass's forward and backward on a default device, and asks the simulator for the timeline.
Choosing them under a memory limit is not implemented; asking for it is an error
(`autopipe.options`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopipe.passes.simulate import Timeline, simulate
from autopipe.report.stages import StageView, views
from autopipe.report.table import table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.options import Options
    from autopipe.passes.staged import Split


@dataclass(frozen=True)
class Plan:
    """Who runs what.

    Attributes:
        stages: the stages with their boundary tensors and costs.
        sizes: samples in each micro-batch.
        schedule: name of the schedule.
        remat: rematerialization policy.
        timeline: predicted; its unit is the mean stage's forward of one micro-batch, since costs
            are those of a default device. Transfers are taken as free.
        notes: what capture did that a reader should know.
    """

    stages: tuple[StageView, ...]
    sizes: tuple[int, ...]
    schedule: str
    remat: str
    timeline: Timeline
    notes: tuple[str, ...]

    @property
    def balance(self) -> float:
        """Mean stage over largest stage, by estimated time."""
        seconds = [s.cost.seconds for s in self.stages]
        return sum(seconds) / len(seconds) / max(seconds) if max(seconds) else 1.0

    def __str__(self) -> str:
        return table(self)


def plan(split: Split, sizes: Sequence[int], options: Options) -> Plan:
    """The plan of a split program for a sequence of micro-batch sizes."""
    stages = views(split, sizes, options.devices)
    costs = [stage.cost for stage in stages]
    mean = sum(c.forward_seconds for c in costs) / len(costs) or 1.0
    timeline = simulate(
        options.schedule,
        stages=len(stages),
        chunks=len(sizes),
        forward=[c.forward_seconds / mean for c in costs],
        backward=[c.backward_seconds / mean for c in costs],
        recompute=[c.recompute_seconds / mean for c in costs] if options.remat == "full" else 0.0,
    )
    return Plan(
        stages, tuple(sizes), options.schedule, options.remat, timeline, split.captured.notes
    )
