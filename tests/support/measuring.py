"""Measured steps made by hand, from simulated timelines."""

from __future__ import annotations

from collections.abc import Sequence

from autopipe.passes.schedule import Scheduled, Timeline, schedule, simulate_actions
from autopipe.planning.measured import Measured
from autopipe.planning.measured_data import MeasuredSteps
from autopipe.planning.plans import Plan


def timeline_of(scheduled: Scheduled, seconds: Sequence[dict[str, float]]) -> Timeline:
    """A step whose phases take given times.

    Args:
        scheduled: what runs.
        seconds: for each stage, by phase.
    """
    return simulate_actions(
        scheduled, lambda phase, stage, m: seconds[stage][phase], lambda *key: 0.0
    )


def made_measured(
    plan: Plan,
    seconds: Sequence[Sequence[dict[str, float]]],
    ops: Sequence[Sequence[str]] | None = None,
    earlier: Measured | None = None,
) -> Measured:
    """Steps of a plan with given times of its phases.

    Args:
        plan: what ran.
        seconds: for each step and stage, by phase.
        ops: names of each stage's ops; None: made up.
        earlier: what the plan was made with.
    """
    scheduled = schedule(plan.schedule, len(plan.stages), len(plan.sizes))
    names = ops or [[f"op_{k}"] for k in range(len(plan.stages))]
    lines = tuple(timeline_of(scheduled, step) for step in seconds)
    measured = Measured(earlier)
    steps = MeasuredSteps(plan, scheduled, tuple(map(tuple, names)), lines)
    measured.complete(steps, others=0, unfinished=0)
    return measured
