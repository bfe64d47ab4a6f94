"""How a model would be cut and what each device would do, before anything runs.

Today's plan takes devices, chunks, schedule and rematerialization as given, balances the cut by the
rough costs of the cost pass, and asks the simulator for the timeline. Choosing them under a memory
limit is not implemented; asking for it is an error (`autopipe.options`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopipe.passes.cost import BACKWARD_FACTOR
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
            are those of a rough device. Transfers are taken as free.
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
    mean = sum(s.cost.seconds for s in stages) / len(stages) or 1.0
    forward = [s.cost.seconds / mean for s in stages]
    timeline = simulate(
        options.schedule,
        stages=len(stages),
        chunks=len(sizes),
        forward=forward,
        backward=[(BACKWARD_FACTOR - 1) * f for f in forward],
        recompute=forward if options.remat == "full" else 0.0,
    )
    return Plan(
        stages, tuple(sizes), options.schedule, options.remat, timeline, split.captured.notes
    )
