"""Choose policies for a given cut: each stage recomputes as little as its memory limit allows.

Policies are ordered from least recomputation to least memory; such a sequence is called a ladder. A
stage's policy affects the memory and time of that stage and hardly those of others, so in each
round all stages move at once, each on its own ladder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autopipe.errors import MemoryLimitError
from autopipe.formatting import format_bytes
from autopipe.passes.remat_policies import fraction_policy, parse_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from autopipe.passes.ir import Phased, Split
    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.planning.plan_parts import StagePlan
    from autopipe.planning.plans import Plan

    MakeCandidate = Callable[[Sequence[RematPolicy]], "Candidate"]  # from a policy per stage

HALVINGS = 3
"""Bisection steps between two neighbouring policies, to find the fraction that just fits."""

WORTHWHILE = 0.002
"""Finer fractions are tried only if they could save this fraction of a step's time."""


@dataclass(frozen=True)
class Candidate:
    """A plan, with the split and the phases that it was computed from."""

    plan: Plan
    split: Split
    phased: Mapping[int, Phased]

    @property
    def fits(self) -> bool:
        """Whether every stage stays within its limit."""
        return not any(map(missing_bytes, self.plan.stages))


@dataclass(frozen=True)
class FittedCut:
    """Plans of one cut.

    Attributes:
        chosen: the best of them.
        tried: for each stage its plan with each policy that was tried.
    """

    chosen: Candidate
    tried: tuple[dict[RematPolicy, StagePlan], ...]

    @property
    def step_seconds(self) -> float:
        """Predicted time of a step."""
        return self.chosen.plan.step_seconds

    @property
    def used_fraction(self) -> float:
        """The largest fraction of its memory limit that a stage uses."""
        stages = self.chosen.plan.stages
        limits = [(s.memory_bytes, s.limit_bytes) for s in stages if s.limit_bytes is not None]
        return max(used / max(limit, 1) for used, limit in limits)


def fit_policies(
    make: MakeCandidate,
    ladders: Sequence[Sequence[RematPolicy]],
    start: Sequence[RematPolicy],
    *,
    climb: bool = True,
) -> FittedCut:
    """Give each stage the first policy on its ladder with which it fits.

    A stage that fits with its starting policy tries the policies before it on the ladder; one that
    does not fit tries those after it. A stage that fits with none gets the last one.

    Args:
        make: plans the cut with a policy per stage.
        ladders: for each stage, policies from least recomputation to least memory.
        start: for each stage the policy of its ladder to try first.
        climb: whether a stage that fits tries policies with less recomputation.
    """
    steps = [ladder.index(policy) for ladder, policy in zip(ladders, start, strict=True)]
    tried: tuple[dict[RematPolicy, StagePlan], ...] = tuple({} for _ in steps)
    while True:
        chosen = make([ladder[i] for ladder, i in zip(ladders, steps, strict=True)])
        before = list(steps)
        for k, stage in enumerate(chosen.plan.stages):
            ladder, i = ladders[k], steps[k]
            tried[k][ladder[i]] = stage
            if missing_bytes(stage):
                steps[k] = min(i + 1, len(ladder) - 1)
            elif climb and i and ladder[i - 1] not in tried[k]:
                steps[k] = i - 1
        if steps == before:
            return FittedCut(chosen, tried)


def refine_policies(make: MakeCandidate, found: FittedCut) -> Candidate:
    """Try finer fractions than the ladder's for the stages that delay the step.

    Args:
        make: plans the same cut with a policy per stage.
        found: a plan that fits.

    Returns:
        The fastest plan that fits, possibly the one of `found`.
    """
    ranges = _ranges(found)
    if not ranges:
        return found.chosen
    own = [_policy(stage) for stage in found.chosen.plan.stages]
    plans = [found.chosen]
    for i in range(HALVINGS + 1):
        # Try the middle between a fraction that fits and one that does not; at the end, what fits.
        tried = {k: (a + b) / 2 if i < HALVINGS else a for k, (a, b) in ranges.items()}
        chosen = make([_at_share(policy, tried.get(k)) for k, policy in enumerate(own)])
        plans += [chosen] if chosen.fits else []
        for k, fraction in tried.items():
            a, b = ranges[k]
            large = missing_bytes(chosen.plan.stages[k])
            ranges[k] = (a, fraction) if large else (fraction, b)
    return min(plans, key=lambda one: one.plan.step_seconds)


def _ranges(found: FittedCut) -> dict[int, tuple[float, float]]:
    """For each stage that delays the step: a fraction that fits, and one that does not."""
    plan = found.chosen.plan
    above: dict[int, RematPolicy] = {}
    for k, (stage, tried) in enumerate(zip(plan.stages, found.tried, strict=True)):
        own = _policy(stage)
        large = [p for p in tried if p.rank < own.rank and missing_bytes(tried[p])]
        if large and own.min_cut_share is not None and own.min_cut_share < 1:
            above[k] = max(large, key=lambda policy: policy.rank)

    def step(light: Iterable[int]) -> float:
        stages = [found.tried[k][above[k]] if k in light else s for k, s in enumerate(plan.stages)]
        return replace(plan, stages=tuple(stages)).step_seconds

    least = step(above)
    return {
        k: (_policy(plan.stages[k]).min_cut_share or 0.0, _share_above(policy))
        for k, policy in above.items()
        if step(above.keys() - {k}) > least * (1 + WORTHWHILE)
    }


def _policy(stage: StagePlan) -> RematPolicy:
    policy = parse_policy(stage.remat)
    assert policy is not None
    return policy


def _share_above(policy: RematPolicy) -> float:
    """The share of min-cut's values that a policy which does not fit saves, at most all."""
    return 1.0 if policy.min_cut_share is None else policy.min_cut_share


def _at_share(policy: RematPolicy, share: float | None) -> RematPolicy:
    """The policy of a share of min-cut's values; `policy` if `share` is None or its own."""
    if share is None or share == policy.min_cut_share:
        return policy
    return fraction_policy(share)


def missing_bytes(stage: StagePlan) -> int:
    """Return the bytes by which a planned stage exceeds its limit; 0 if it fits or has no limit."""
    return 0 if stage.limit_bytes is None else max(0, stage.memory_bytes - stage.limit_bytes)


def misfits(plan: Plan, k: int) -> str:
    """Say that stage k, with those beside it, does not fit its device."""
    homes = plan.order.homes
    beside = [i for i, home in enumerate(homes) if home == homes[k]]
    if len(beside) == 1:
        return f"stage {k} does not fit its device"
    return f"stages {', '.join(map(str, beside))} do not fit device {homes[k]} together"


def memory_limit_error(plan: Plan) -> MemoryLimitError:
    """Return the error for a plan that does not fit; it names the stage that exceeds most."""
    k, stage = max(enumerate(plan.stages), key=lambda one: missing_bytes(one[1]))
    homes = plan.order.homes
    total = plan.totals[homes[k]]
    assert total.limit_bytes is not None
    static = sum(
        s.static_bytes for s, home in zip(plan.stages, homes, strict=True) if home == homes[k]
    )
    count = len(plan.sizes)
    return MemoryLimitError(
        f"{misfits(plan, k)}: {format_bytes(missing_bytes(stage))} are missing",
        expected=f"at most {format_bytes(total.limit_bytes)}",
        found=f"{format_bytes(total.memory_bytes)}: parameters, optimizer and buffers"
        f" {format_bytes(static)}; gradients and {count}"
        f" micro-batch{'es' * (count > 1)} of {max(plan.sizes)} with remat {stage.remat}"
        f" {format_bytes(total.memory_bytes - static)}",
        missing_bytes=missing_bytes(stage),
    )
