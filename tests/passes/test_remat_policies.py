"""Rematerialization policies: parsing, order, what each selects; a new one is a class and an entry.

Covers phases/select_saved.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Set as AbstractSet
from itertools import pairwise

import pytest
import torch
from torch import fx

import autopipe
from autopipe.errors import OptionError
from autopipe.passes import remat_policies
from autopipe.passes.remat_policies import (
    DEFAULT,
    FULL,
    LADDER,
    MIN_CUT,
    NONE,
    OFFLOAD,
    POLICIES,
    JointValues,
    NodeT,
    OpEstimate,
    RematPolicy,
    SaveFraction,
    fraction_policy,
    parse_policy,
    policy_options,
)
from tests.support.agreement import assert_agrees
from tests.support.phased import Layers
from tests.support.programs import phased_of, split_of

HALF = fraction_policy(0.5)


@pytest.mark.parametrize(
    ("option", "policy"),
    [
        ("full", FULL),
        ("none", NONE),
        ("min-cut", MIN_CUT),
        ("offload", OFFLOAD),
        (0.5, HALF),
        ("0.5", HALF),
        (1, fraction_policy(1.0)),
        (0, fraction_policy(0.0)),
    ],
)
def test_options_are_parsed(option: str | float, policy: RematPolicy) -> None:
    assert parse_policy(option) == policy


@pytest.mark.parametrize("option", ["half", "auto", "", "nan", 1.5, -0.1, "1.5", True, None, [0.5]])
def test_other_options_denote_no_policy(option: object) -> None:
    assert parse_policy(option) is None


def test_names_denote_their_policies() -> None:
    for policy in (*POLICIES, *LADDER, fraction_policy(0.9375), fraction_policy(0.3)):
        assert parse_policy(policy.option) == policy
        assert parse_policy(policy.name) == policy


def test_policies_are_equal_if_their_options_are() -> None:
    every = [*POLICIES, *map(fraction_policy, (0.0, 0.5, 1.0))]
    for policy in every:
        for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
            assert other == policy
            assert hash(other) == hash(policy)
    assert len({*every, *every}) == len(every)


def test_the_ladder_goes_from_least_recomputation_to_least_memory() -> None:
    assert {*POLICIES} - {OFFLOAD} <= {*LADDER}
    assert OFFLOAD not in LADDER, "its time depends on the device: see planning/offloading.py"
    assert LADDER[0] == NONE
    assert LADDER[-1] == FULL
    op = OpEstimate(autograd_bytes=12, min_cut_bytes=8, is_cheap=False)
    cheap = op._replace(is_cheap=True)
    for light, lean in pairwise(LADDER):
        assert light.rank < lean.rank
        assert light.saved_bytes(op) > lean.saved_bytes(op)
        assert light.recomputed_share(op) <= lean.recomputed_share(op)
        assert light.recomputed_share(cheap) <= lean.recomputed_share(cheap)
    four = (NONE, MIN_CUT, HALF, FULL)
    assert [policy.saved_bytes(op) for policy in four] == [12, 8, 4, 0]
    assert [policy.recomputed_share(op) for policy in four] == [0, 0, 0.25, 1]
    assert [policy.recomputed_share(cheap) for policy in four] == [0, 1, 1, 1]
    assert [policy.min_cut_share for policy in four] == [None, 1, 0.5, 0]
    assert [policy.saves_received for policy in four] == [False, True, True, True]
    assert [p.min_cut_share for p in LADDER].count(0.5) == 1, "by a name, or by the fraction"


class SaveHalf(SaveFraction):
    """The fraction 0.5, with a name."""


def test_a_fraction_is_tried_unless_a_policy_with_a_name_saves_that_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unnamed = tuple(p for p in POLICIES if p.min_cut_share != 0.5)
    named = SaveHalf("half", 1.5, 0.5)
    for policies, tried in ((unnamed, HALF), ((*unnamed, named), named)):
        monkeypatch.setattr(remat_policies, "POLICIES", policies)
        ladder = remat_policies._ladder()
        assert [p for p in ladder if p.min_cut_share == 0.5] == [tried]
        assert {*unnamed} - {OFFLOAD} <= {*ladder}
        assert [p.rank for p in ladder] == sorted({p.rank for p in ladder})


def test_offloading_saves_what_none_saves_but_not_on_the_device() -> None:
    op = OpEstimate(autograd_bytes=12, min_cut_bytes=8, is_cheap=True)
    assert OFFLOAD.saved_bytes(op) == OFFLOAD.recomputed_share(op) == 0
    values = JointValues({"x", "relu"}, {"x"}, lambda budget: set())
    assert OFFLOAD.select(values) == NONE.select(values)
    assert OFFLOAD.saves_received == NONE.saves_received
    assert [p for p in POLICIES if p.least_offloaded is not None] == [OFFLOAD]
    assert LADDER[0].rank < OFFLOAD.rank < LADDER[1].rank


def test_each_policy_selects_its_values() -> None:
    budgets = []

    def min_cut(budget: float) -> set[str]:
        budgets.append(budget)
        return {"product"}

    values = JointValues({"x", "product", "relu"}, {"x"}, min_cut)
    assert NONE.select(values) == {"x", "product", "relu"}
    assert FULL.select(values) == {"x"}
    assert fraction_policy(0.0).select(values) == {"x"}
    assert budgets == []
    assert MIN_CUT.select(values) == HALF.select(values) == {"product"}
    assert budgets == [1.0, 0.5]


def test_messages_list_all_options() -> None:
    with pytest.raises(OptionError) as error:
        autopipe.compile(Layers(2), 2, remat="some")
    assert all(option in str(error.value) for option in policy_options())
    assert f"remat={DEFAULT.option!r}" in repr(autopipe.compile(Layers(2), ["cpu"] * 2, 2))


class SaveLayers(RematPolicy):
    """Save what linear layers compute, and recompute the rest."""

    def select(self, values: JointValues[NodeT]) -> AbstractSet[NodeT]:
        return {n for n in values.forward if isinstance(n, fx.Node) and "addmm" in n.name}

    def saved_bytes(self, op: OpEstimate) -> float:
        return 0.0 if op.is_cheap else float(op.autograd_bytes)

    def recomputed_share(self, op: OpEstimate) -> float:
        return float(op.is_cheap)


def test_a_new_policy_is_a_class_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users, plans and messages know it by its name; stages save what it selects."""
    layers = SaveLayers("layers", 0.5)
    monkeypatch.setattr(remat_policies, "POLICIES", (*POLICIES, layers))
    model, x = Layers(4).double(), torch.randn(6, 6, dtype=torch.double)
    pipe = autopipe.compile(model, ["cpu"] * 2, 3, remat="layers", args=(x,))
    assert_agrees(pipe, x)
    phased = phased_of(split_of(model, 1, x), model, 2, ((x,), {}), remat="layers")
    (stage,) = phased.stages
    assert [n.split("_")[0] for n in stage.saved].count("addmm") == 4
    assert {n.split("_")[0] for n in stage.saved} == {"addmm", "primals"}  # (the received value)
    assert "R" in stage.phase_of.values()
    assert "remat='layers'" in repr(pipe)
    plan = autopipe.plan(Layers(4), ["cpu"] * 2, 3, remat=["layers", "full"], args=(x.float(),))
    assert [stage.remat for stage in plan.stages] == ["layers", "full"]
    assert "layers in 1" in plan.remat
    autopipe.compile(Layers(4), plan=plan, args=(x.float(),))
    with pytest.raises(OptionError, match="layers"):
        autopipe.compile(Layers(2), 2, remat="some")
