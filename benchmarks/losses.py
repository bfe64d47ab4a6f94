"""Why a measured step is longer than its simulation: parts that add up to the difference."""

from __future__ import annotations

from typing import NamedTuple

from autopipe.planning.measured_data import MeasuredData


class Losses(NamedTuple):
    """Seconds that a step takes longer than the simulation with its phases' median times.

    The device that computes longest counts. Each part may be negative.

    Attributes:
        uneven: its actions took longer than their medians: other work, the caches, and what both
            cores ask of the memory at the same time.
        waiting: it waited longer than it does in the simulation.
        between: between its actions: Python.
        outside: before the first action of all and after the last one, and the caller's time
            between the passes.
    """

    uneven: float
    waiting: float
    between: float
    outside: float


def losses_of(measured: MeasuredData, step_seconds: float) -> Losses:
    """Split what a step takes longer than its simulation.

    Args:
        measured: of a profile; its median step counts.
        step_seconds: how long a step took for its caller.
    """
    line, simulated = measured.timeline, measured.simulated
    device = max(range(len(line.spans)), key=line.busy.__getitem__)
    busy, waiting, row = line.busy[device], line.waiting[device], line.spans[device]
    before_and_after = row[0].start + line.makespan - row[-1].end
    between = line.makespan - busy - waiting - before_and_after - line.pause_length
    idle = simulated.makespan - simulated.busy[device]
    return Losses(
        busy - simulated.busy[device],
        waiting + before_and_after - idle,
        between,
        step_seconds - line.makespan + line.pause_length,
    )
