"""Policies for a cut, on stages whose memory is given by a table; truth is every combination.

Covers planning/make_plan.py (with `test_plans`, which checks its numbers).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from autopipe.errors import MemoryLimitError
from autopipe.passes.remat_policies import LADDER, RematPolicy
from autopipe.planning.fitting import (
    Candidate,
    FittedCut,
    fit_policies,
    memory_limit_error,
    missing_bytes,
    refine_policies,
)
from autopipe.planning.plan_parts import DeviceTotal, StagePlan, Times
from tests.support.plans import made_plan

pytestmark = pytest.mark.few(4)

LIMIT = 1000


def stage(of: StagePlan, policy: RematPolicy, nbytes: int, seconds: float) -> StagePlan:
    """A stage that takes so many bytes, and so long to recompute."""
    static = of.memory_bytes - of.peak_bytes
    times = tuple(replace(t, recompute=seconds) for t in of.times)
    return replace(
        of, remat=policy.name, peak_bytes=nbytes - static, limit_bytes=LIMIT, times=times
    )


class Cut:
    """A cut whose stages take what a function of the policy says."""

    def __init__(self, stages: int, nbytes: Any, seconds: Any = lambda k, p: p.rank * 1e-3) -> None:
        base = made_plan(stages, (4, 4))
        clean = tuple(
            replace(
                s,
                **dict.fromkeys(
                    ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "buffer_bytes"), 0
                ),
                times=(Times(1e-3, 0.0, 1e-3, 0.0, 0.0, 0.0),) * len(s.times),
            )
            for s in base.stages
        )
        self.base = replace(base, stages=clean)
        self.nbytes, self.seconds, self.count = nbytes, seconds, 0

    def __call__(self, remat: Sequence[RematPolicy]) -> Candidate:
        self.count += 1
        stages = tuple(
            stage(s, p, self.nbytes(k, p), self.seconds(k, p))
            for k, (s, p) in enumerate(zip(self.base.stages, remat, strict=True))
        )
        totals = tuple(DeviceTotal(0, s.memory_bytes, LIMIT) for s in stages)
        plan = replace(self.base, stages=stages, totals=totals)
        return Candidate(plan, None, {})  # type: ignore[arg-type]


def policies(candidate: Candidate) -> list[str]:
    return [s.remat for s in candidate.plan.stages]


@pytest.mark.parametrize("seed", range(20))
def test_each_stage_gets_the_first_policy_with_which_it_fits(seed: int) -> None:
    """From wherever it starts; with memory that falls along the ladder."""
    generator = random.Random(seed)
    table = [sorted(generator.sample(range(500, 1500), len(LADDER)))[::-1] for _ in range(3)]
    cut = Cut(3, lambda k, p: table[k][LADDER.index(p)])
    start = [generator.choice(LADDER) for _ in range(3)]
    found = fit_policies(cut, [LADDER] * 3, start)
    wanted = [
        next((p for p, n in zip(LADDER, row, strict=True) if n <= LIMIT), LADDER[-1])
        for row in table
    ]
    assert policies(found.chosen) == [p.name for p in wanted]
    assert cut.count <= len(LADDER) + 1
    for k, tried in enumerate(found.tried):
        assert all(tried[p].memory_bytes == table[k][LADDER.index(p)] for p in tried)
    used = max(row[LADDER.index(p)] for row, p in zip(table, wanted, strict=True))
    assert found.used_fraction == used / LIMIT
    assert found.step_seconds == found.chosen.plan.step_seconds


def test_without_climbing_the_first_that_fits_will_do() -> None:
    cut = Cut(2, lambda k, p: 10)
    found = fit_policies(cut, [LADDER] * 2, LADDER[-1:] * 2, climb=False)
    assert policies(found.chosen) == [LADDER[-1].name] * 2
    assert cut.count == 1


def shares(k: int, p: RematPolicy) -> int:
    """Memory is a line through min-cut's share; "none" needs more."""
    return 2000 if p.min_cut_share is None else int(600 + 800 * p.min_cut_share)


def test_finer_fractions_come_close_to_the_limit() -> None:
    """Half of min-cut's values fit exactly; the bisection ends there, from below."""

    def seconds(k: int, p: RematPolicy) -> float:
        return 1e-3 * (1 - (p.min_cut_share or 0.0))

    cut = Cut(2, lambda k, p: shares(k, p) - 120, seconds)  # a share of 0.65 would fit
    found = fit_policies(cut, [LADDER] * 2, LADDER[-1:] * 2)
    assert [s.memory_bytes for s in found.chosen.plan.stages] == [880, 880]
    better = refine_policies(cut, found)
    assert better.plan.step_seconds < found.step_seconds
    assert better.fits
    assert all(880 < s.memory_bytes <= LIMIT for s in better.plan.stages)


def test_refining_never_makes_a_plan_slower() -> None:
    for nbytes in (shares, lambda k, p: 10):
        cut = Cut(2, nbytes)
        found = fit_policies(cut, [LADDER] * 2, LADDER[:1] * 2)
        better = refine_policies(cut, found)
        assert better.plan.step_seconds <= found.step_seconds
        assert better.fits or not found.chosen.fits


def test_what_is_missing() -> None:
    candidate = Cut(2, lambda k, p: 900 + 300 * k)(LADDER[:1] * 2)
    assert [missing_bytes(s) for s in candidate.plan.stages] == [0, 200]
    assert not candidate.fits
    error = memory_limit_error(candidate.plan)
    assert isinstance(error, MemoryLimitError)
    assert error.missing_bytes == 200
    assert str(error).startswith("stage 1 does not fit its device: 200 B are missing")
    free = replace(candidate.plan.stages[1], limit_bytes=None)
    assert missing_bytes(free) == 0


def test_the_fastest_of_all_combinations_that_fit_is_found() -> None:
    """Where a later policy takes less memory and more time, the first that fits is the best."""
    generator = random.Random(1)
    table = [sorted(generator.sample(range(700, 1300), len(LADDER)))[::-1] for _ in range(2)]
    cut = Cut(2, lambda k, p: table[k][LADDER.index(p)], lambda k, p: 1e-3 * LADDER.index(p))
    found: FittedCut = fit_policies(cut, [LADDER] * 2, [LADDER[1]] * 2)
    every = [cut(remat) for remat in itertools.product(LADDER, repeat=2)]
    best = min(c.plan.step_seconds for c in every if c.fits)
    assert found.step_seconds == pytest.approx(best)
