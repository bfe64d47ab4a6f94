"""By how much estimates were too low, and what untried policies learn from it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

import autopipe
from autopipe.passes.remat_policies import LADDER, parse_policy
from autopipe.passes.split.stage_estimate import estimate_stages
from autopipe.planning.estimate_errors import corrections_for, underestimated_bytes
from tests.support.phased import Layers
from tests.support.programs import objective_for, split_of

FULL, NONE = parse_policy("full"), parse_policy("none")


def test_errors_are_the_plan_s_bytes_above_the_estimate() -> None:
    model, x = Layers(4), torch.randn(4, 6)
    split, objective = split_of(model, 2, x), objective_for(2, 2)
    plan = autopipe.plan(model, ["cpu"] * 2, 2, args=(x,), remat=["none", "full"])
    other = replace(plan.stages[1], peak_bytes=plan.stages[1].peak_bytes + 1000)
    tried: Any = ({NONE: plan.stages[0]}, {FULL: plan.stages[1], NONE: other})
    found: Any = SimpleNamespace(tried=tried)
    errors = underestimated_bytes(split, objective, found)
    first = estimate_stages(split, replace(objective, remat=(NONE, FULL))).nbytes
    second = estimate_stages(split, replace(objective, remat=(NONE, NONE))).nbytes
    assert errors == {
        (0, NONE): plan.stages[0].memory_bytes - second[0],
        (1, FULL): plan.stages[1].memory_bytes - first[1],
        (1, NONE): other.memory_bytes - second[1],
    }
    assert first[0] == second[0]


def test_an_untried_policy_takes_the_error_of_the_nearest_one() -> None:
    objective = replace(objective_for(3, 2), remat=(LADDER,) * 3, limits=(1,) * 3)
    corrections = corrections_for(objective, {(0, NONE): 10, (0, FULL): 20, (2, FULL): 5})
    for policy in LADDER:
        nearer = abs(policy.rank - NONE.rank) <= abs(policy.rank - FULL.rank)
        assert corrections[0, policy] == (10 if nearer else 20)
        assert corrections[2, policy] == 5
    assert {k for k, _ in corrections} == {0, 2}, "nothing is known of stage 1"
