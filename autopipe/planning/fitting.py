"""One cut, as a plan whose stages make no more work than they must in order to fit.

A stage's policy is looked for on a ladder. What a stage keeps concerns its own memory and time, and
next to nothing else, so all stages move at once, each on its own ladder.
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

    Make = Callable[
        [Sequence[RematPolicy]], "Candidate"
    ]  # the plan of a cut, a policy for each stage

HALVINGS = 3
"""How often the way between two rungs is halved, to find the fraction that just fits."""

WORTH = 0.002
"""Of a step: what the work that a finer fraction could save must come to."""


@dataclass(frozen=True)
class Candidate:
    """A plan, with what it was made from."""

    plan: Plan
    split: Split
    phased: Mapping[int, Phased]

    @property
    def fits(self) -> bool:
        """Whether every stage keeps its limit."""
        return not any(map(missing_bytes, self.plan.stages))


@dataclass(frozen=True)
class Fitted:
    """What came of a cut.

    Attributes:
        chosen: the plan.
        tried: for each stage what it takes with the policies that were tried.
    """

    chosen: Candidate
    tried: tuple[dict[RematPolicy, StagePlan], ...]


def fitted(
    make: Make,
    ladders: Sequence[Sequence[RematPolicy]],
    start: Sequence[RematPolicy],
    *,
    climb: bool = True,
) -> Fitted:
    """The plan in which each stage has the first policy of its ladder with which it fits.

    A stage that fits with the policy it starts with tries those before it, one that does not those
    after it; if it fits with none it is left with the last one.

    Args:
        make: makes a plan.
        ladders: for each stage, from the policy that makes least work to the one that keeps least.
        start: for each stage a policy of its ladder, by estimate the one that is looked for.
        climb: whether to try what makes less work than a policy that fits.
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
            return Fitted(chosen, tried)


def refined(make: Make, found: Fitted) -> Candidate:
    """A plan that fits, with finer fractions than the ladder's where a shorter step comes of it.

    Args:
        make: makes a plan of the same cut.
        found: a plan that fits.
    """
    ranges = _ranges(found)
    if not ranges:
        return found.chosen
    own = [_policy(stage) for stage in found.chosen.plan.stages]
    plans = [found.chosen]
    for i in range(HALVINGS + 1):
        # Half way between what fits and what does not; at last what fits.
        tried = {k: (a + b) / 2 if i < HALVINGS else a for k, (a, b) in ranges.items()}
        chosen = make([_at_share(policy, tried.get(k)) for k, policy in enumerate(own)])
        plans += [chosen] if chosen.fits else []
        for k, fraction in tried.items():
            a, b = ranges[k]
            large = missing_bytes(chosen.plan.stages[k])
            ranges[k] = (a, fraction) if large else (fraction, b)
    return min(plans, key=lambda one: one.plan.step_seconds)


def _ranges(found: Fitted) -> dict[int, tuple[float, float]]:
    """For stages that delay the step: a fraction that fits, and a larger one that does not."""
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
        if step(above.keys() - {k}) > least * (1 + WORTH)
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
    """By how much a planned stage is above its limit; 0 if it fits, or has none."""
    return 0 if stage.limit_bytes is None else max(0, stage.memory_bytes - stage.limit_bytes)


def does_not_fit(made: Plan) -> MemoryLimitError:
    """The error of a plan: its stage that lacks most."""
    k, stage = max(enumerate(made.stages), key=lambda one: missing_bytes(one[1]))
    assert stage.limit_bytes is not None
    count = len(made.sizes)
    return MemoryLimitError(
        f"stage {k} does not fit its device: {format_bytes(missing_bytes(stage))} are missing",
        expected=f"at most {format_bytes(stage.limit_bytes)}",
        found=f"{format_bytes(stage.memory_bytes)}: parameters, optimizer and buffers"
        f" {format_bytes(stage.static_bytes)}; gradients and {count}"
        f" micro-batch{'es' * (count > 1)} of {max(made.sizes)} with remat {stage.remat}"
        f" {format_bytes(stage.peak_bytes)}",
        missing_bytes=missing_bytes(stage),
    )
