"""The numbers that the page draws, computed from a plan in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from autopipe.errors import PlanError
from autopipe.planning.plan_parts import Times

if TYPE_CHECKING:
    from autopipe.passes.schedule import Timeline
    from autopipe.planning.plan_parts import Crossing, StagePlan
    from autopipe.planning.plans import Plan

CAVEAT = (
    "Unless they were measured, times are those of a device in a table: they say more of one stage "
    "against another than of a clock."
)
LARGEST_SIMULATION = 20_000
"""Stages times micro-batches above which other numbers of micro-batches are not simulated: each
would take seconds."""


@dataclass(frozen=True)
class Part:
    """A part of a stacked bar.

    Attributes:
        name: for the legend.
        class_: the CSS class that gives its colour.
        size: seconds or bytes.
    """

    name: str
    class_: str
    size: float


@dataclass(frozen=True)
class PageData:
    """A plan, and what the page draws beyond its fields."""

    plan: Plan

    @property
    def limit_bytes(self) -> int | None:
        """The memory limit of a device, the largest if they differ; None: there is no limit.

        Where devices have several stages, the limit is for all of these, and none is drawn.
        """
        if self.plan.devices < len(self.plan.stages):
            return None
        limits = [t.limit_bytes for t in self.plan.totals if t.limit_bytes is not None]
        return max(limits, default=None)

    @cached_property
    def timeline(self) -> Timeline:
        """The plan's timeline, simulated once."""
        return self.plan.timeline

    @property
    def batch(self) -> int:
        """Number of samples in the batch that was planned for."""
        return sum(self.plan.sizes)

    @cached_property
    def step_seconds(self) -> tuple[tuple[int, float], ...]:
        """(M, predicted step time) for powers of two up to four times the plan's M, and that M.

        M is at most the number of samples, and values whose simulation would take long are left
        out. The plan's own time is that of its step, in which all micro-batches take as long as the
        largest.
        """
        own, K = len(self.plan.sizes), len(self.plan.stages)
        known = {own: self.plan.step_seconds}
        for m in (2**i for i in range(32)):
            if m not in known and m <= min(4 * own, self.batch) and m * K <= LARGEST_SIMULATION:
                known[m] = with_chunks(self.plan, m).step_seconds
        return tuple(sorted(known.items()))


def check(facts: PageData) -> None:
    """Refuse numbers that cannot be drawn; a plan's file may contain any.

    Raises:
        PlanError: a step beyond 1e15 seconds or below 1e-15, a count of more than 64 bits.
    """
    plan, makespan = facts.plan, facts.plan.step_seconds
    if makespan and not 1e-15 < makespan < 1e15:
        raise PlanError(
            "the plan's times cannot be drawn",
            expected="a step of 0, or of 1e-15 to 1e15 seconds",
            found=f"{makespan:.3g}",
        )
    counts = {f"stages[{k}].{n}": v for k, s in enumerate(plan.stages) for n, v in vars(s).items()}
    counts |= {f"{c.name!r:.80}": c.nbytes for c in plan.crossings}
    counts |= {"sizes": facts.batch}
    for name, value in counts.items():
        if isinstance(value, int) and value.bit_length() > 64:
            found = f"{value.bit_length()} bits"
            raise PlanError(
                f"the plan cannot be drawn: {name}", expected="64 bits at most", found=found
            )


def times(stage: StagePlan) -> tuple[Part, ...]:
    """Times of one micro-batch in a stage, in the order of execution."""
    return (
        Part("forward", "F", stage.forward_seconds),
        Part("recompute", "R", stage.recompute_seconds),
        Part("backward", "B", stage.backward_seconds),
    )


def memory(stage: StagePlan) -> tuple[Part, ...]:
    """The parts of the memory that a stage needs; their sum is `memory_bytes`."""
    saved = min(stage.peak_saved_bytes, stage.peak_bytes)
    return (
        Part(
            "parameters", "P", stage.parameter_bytes + stage.buffer_bytes + stage.shared_copy_bytes
        ),
        Part("optimizer", "O", stage.optimizer_bytes),
        Part("saved for backward, all in flight", "K", saved),
        Part("gradients, and what a phase makes", "A", stage.peak_bytes - saved),
    )


def pieces(plan: Plan, phase: str, stage: int) -> tuple[tuple[str, float], ...]:
    """Split an action into the phases that are drawn, as (class, share of its time).

    "RBW" is drawn as recompute, then backward.

    Args:
        plan: gives the times.
        phase: letters of the action, such as "F" or "RBW".
        stage: index of its stage.
    """
    s = plan.stages[stage]
    size = {"F": s.forward_seconds, "R": s.recompute_seconds, "B": s.backward_seconds}
    # A plan does not distinguish B from W: if they run together, B is the time of both.
    letters = phase.replace("BW", "B")
    total = sum(size.get(letter, 0.0) for letter in letters)
    if len(letters) == 1 or not total:
        return ((letters[-1], 1.0),)
    return tuple((a, size.get(a, 0.0) / total) for a in letters if size.get(a, 0.0) > 0)


def crossing_ends(crossing: Crossing) -> tuple[str, str]:
    """Source and targets of a tensor as text: ``stage 0`` and ``stages 1–4, 7, caller``."""
    source = "caller" if crossing.source is None else f"stage {crossing.source}"
    targets = sorted(crossing.targets)
    runs: list[list[int]] = []
    for k in targets:
        if runs and runs[-1][-1] == k - 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    ranges = [f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    words = [f"stage{'s' * (len(targets) > 1)} {', '.join(ranges)}"] if targets else []
    return source, ", ".join(words + ["caller"] * crossing.returned)


def with_chunks(plan: Plan, chunks: int) -> Plan:
    """The same cut and batch with another number of micro-batches.

    Times are assumed to be proportional to samples; all micro-batches take the mean time. Issuing
    the calls of a micro-batch takes the same time for any size.

    Args:
        plan: the plan to change.
        chunks: number of micro-batches; at most the number of samples is used.
    """
    batch = sum(plan.sizes)
    chunks = min(chunks, batch)
    few, more = divmod(batch, chunks)
    factor = batch / chunks / max(plan.sizes)

    def scaled(times: Times) -> Times:
        found = Times(*(t * factor for t in vars(times).values()))
        return dataclasses.replace(found, issue=times.issue)

    stages = tuple(
        dataclasses.replace(stage, times=(scaled(stage.times[0]),)) for stage in plan.stages
    )
    sizes = (few + 1,) * more + (few,) * (chunks - more)
    if more:
        stages = tuple(dataclasses.replace(s, times=s.times * 2) for s in stages)
    return dataclasses.replace(plan, chunks=chunks, sizes=sizes, stages=stages)


def least_seconds(facts: PageData) -> float:
    """Lower bound of the step time: the busiest device's time for the whole batch."""
    plan = facts.plan
    return max(plan.device_seconds) / max(plan.sizes) * facts.batch
