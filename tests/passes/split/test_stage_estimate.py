"""Estimates of stages, computed here by definition, and cuts that follow from them.

Covers split/op_costs.py, split/stage_loads.py and split/min_cut_estimate.py.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import random
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autopipe.errors import OptionError, PartitionError
from autopipe.passes.cost.meta_run import tensor_operands
from autopipe.passes.cost.node_costs import CallSeconds, annotate, call_seconds, recomputed_calls
from autopipe.passes.devices import DEFAULT, H100, L4, Device, Link
from autopipe.passes.graph.fx_utils import tensors_of
from autopipe.passes.ir import StageEstimates
from autopipe.passes.ir.split import Split
from autopipe.passes.ir.values import InputKind, at_batch
from autopipe.passes.remat_policies import (
    FULL,
    LADDER,
    MIN_CUT,
    NONE,
    RematPolicy,
    fraction_policy,
)
from autopipe.passes.split.assign_stages import SLACK
from autopipe.passes.split.cut import split
from autopipe.passes.split.objective import Objective, objective_of
from autopipe.passes.split.op_costs import OpCosts
from autopipe.passes.split.stage_estimate import estimate_assignment
from autopipe.passes.split.stage_loads import OrderedOps
from tests.support.programs import captured_of, known

pytestmark = pytest.mark.few(2)

SIZE = 2


def objective(models: list[Device], **change: Any) -> Objective:
    K = len(models)
    plain = Objective(SIZE, tuple(models), (NONE,) * K, (1,) * K, (None,) * K)
    return replace(plain, **change)


def saves_of(cut: Split, call: fx.Node) -> tuple[int, ...]:
    flow = cut.annotated.flows.get(call.name)
    return () if flow is None else flow.saved_operands


def gets_gradient(cut: Split, name: str) -> bool:
    """Does a gradient come for a value: found from eager's rule, not from the costs."""
    graph = cut.captured.graph_module.graph
    trained = {i.name for i in cut.captured.inputs if i.requires_grad}
    needs: set[fx.Node] = set()
    for node in graph.nodes:
        detached = node.target is torch.ops.aten.detach.default
        floating = any(t.is_floating_point() for t in tensors_of(node))
        from_some = any(source in needs for source in node.all_input_nodes)
        if node.name in trained or (from_some and floating and not detached):
            needs.add(node)
    return any(node.name == name for node in needs)


def share_recomputed(cut: Split, wanted: Objective, k: int, node: fx.Node) -> float:
    """Of an op that a backward may recompute."""
    cheap = node in OpCosts(cut.annotated, wanted).min_cut.recomputed
    shares = {"none": 0.0, "full": 1.0, "min-cut": float(cheap), 0.25: 1.0 if cheap else 0.75**2}
    (policy,) = wanted.policies(k)
    return shares[policy.option]


def saved_of(cut: Split, wanted: Objective, k: int) -> float:
    """Bytes of the results of a stage that another micro-batch in flight saves."""
    annotated, (policy,) = cut.annotated, wanted.policies(k)
    saved = {n: at_batch(annotated.costs[n.name].saved_bytes, SIZE) for n in cut.ops[k]}
    by_cut = OpCosts(annotated, wanted).min_cut.saved_bytes
    share = {"none": 0.0, "full": 0.0, "min-cut": 1.0, 0.25: 0.25}[policy.option]
    return sum(saved.values()) if policy == NONE else share * sum(by_cut.get(n, 0) for n in saved)


def expected_seconds(cut: Split, wanted: Objective, k: int) -> float:
    """Of stage k: its calls, and what it receives and sends back."""
    annotated, device = cut.annotated, wanted.devices[k]
    every = [n for ops in cut.ops for n in ops]
    again = recomputed_calls(every, annotated.flows)
    total = 0.0
    for node in cut.ops[k]:
        times = call_seconds(annotated.costs[node.name], device, SIZE)
        total += times.forward + times.backward
        if node in again:
            total += share_recomputed(cut, wanted, k, node) * times.recompute
    for route in cut.routes.values():
        if k in route.consumers:
            once = device.link.seconds(at_batch(route.spec.nbytes, SIZE))
            if route.kind == "activation":
                total += once * (1 + gets_gradient(cut, route.name))
            elif route.kind == "parameter":
                total += once
    return total


def expected_bytes(cut: Split, wanted: Objective, k: int) -> int:
    annotated, stage, n = cut.annotated, cut.stages[k], wanted.in_flight[k]
    received_saved = wanted.policies(k) != (NONE,)
    every = [node for ops in cut.ops for node in ops]
    read = {tensor_operands(c)[i].name for c in every for i in saves_of(cut, c)}
    total = 0
    for item in stage.held:
        size = at_batch(item.spec.nbytes, SIZE)
        first = not any(item in s.held for s in cut.stages[:k])
        trained = item.kind is InputKind.PARAMETER and first
        total += size + (size + 2 * size if trained else 0)
    first = {i.name for s in cut.stages[:k] for i in s.held}
    own = {i.name: i for i in stage.held if i.name not in first}
    parted = {node.name for node in OpCosts(annotated, wanted).shared_parameters}
    for name in parted & own.keys():  # gradients wait from the others; two more while they add up
        total += (min(n, 3) + 2) * at_batch(own[name].spec.nbytes, SIZE)
    total += sum(2 * at_batch(cut.routes[name].spec.nbytes, SIZE) for name in stage.shared)
    costs = [annotated.costs[node.name].saved_bytes for node in cut.ops[k]]
    saved = sum(at_batch(cost, SIZE) for cost in costs)
    total += math.ceil(saved + (n - 1) * saved_of(cut, wanted, k))
    for name in stage.receives:
        if received_saved or name in read:
            total += at_batch(cut.routes[name].spec.nbytes, SIZE) * n
    return total


@pytest.mark.parametrize("name", ["gpt2", "unet", "t5", "tied", "resnet"])
@pytest.mark.parametrize(
    "remat", [FULL, NONE, MIN_CUT, fraction_policy(0.25)], ids=lambda policy: policy.name
)
def test_estimates_are_those_of_the_stages(name: str, remat: RematPolicy) -> None:
    _, _, annotated = known(name)
    for devices in ([L4] * 3, [H100, L4, DEFAULT]):
        wanted = objective(devices, remat=(remat,) * 3, in_flight=(3, 2, 1))
        cut = split(annotated, wanted)
        for k in range(3):
            assert cut.estimates.seconds[k] == pytest.approx(
                expected_seconds(cut, wanted, k), rel=1e-9
            )
            # (a size is rounded up item by item)
            assert cut.estimates.nbytes[k] == pytest.approx(expected_bytes(cut, wanted, k), abs=400)
        assert cut.estimates.lower_bound <= cut.estimates.bottleneck
        assert cut.estimates.gap >= 0


@pytest.mark.parametrize("name", ["gpt2", "t5", "tied", "integer_boundary"])
def test_cost_tables_add_up_to_the_estimates(name: str) -> None:
    """The two ways of adding up: the tables of an order, and any assignment."""
    _, _, annotated = known(name)
    wanted = objective(
        [H100, L4, DEFAULT], remat=(FULL, NONE, fraction_policy(0.5)), in_flight=(3, 2, 1)
    )
    costs = OpCosts(annotated, wanted)
    N = len(costs.ops)
    loads = OrderedOps(costs, costs.ops, range(N)).loads()
    generator = random.Random(0)
    places = [p for p in range(1, N) if costs.ops[p].target is not operator.getitem]
    for _ in range(20):
        starts = sorted(generator.sample(places, 2))
        bounds = [0, *starts, N]
        assignment = {n: (k,) for k in range(3) for n in costs.ops[bounds[k] : bounds[k + 1]]}
        found = estimate_assignment(costs, assignment)
        times = [float(time * loads.unit) for time in loads.stage_times(starts)]
        assert times == pytest.approx(found.seconds, rel=1e-9)
        assert loads.stage_bytes(starts) == pytest.approx(found.nbytes, abs=N)
        assert found.fits([None] * 3)
        assert found.fits(found.nbytes)
        assert not found.fits([None, found.nbytes[1] - 1, None])


class Layers(nn.Module):
    def __init__(self, count: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


LAYERS = annotate(captured_of(Layers(8), torch.randn(4, 8)))


def layers(cut: Split) -> list[int]:
    return [sum("linear" in str(n.target) for n in calls) for calls in cut.ops]


def test_a_device_three_times_as_fast_takes_three_times_as_much() -> None:
    fast = replace(DEFAULT, fp32_flops=3e11, gbytes_per_second=120, launch_seconds=2e-6 / 3)
    assert layers(split(LAYERS, objective([DEFAULT, fast]))) == [2, 6]
    assert layers(split(LAYERS, objective([fast, DEFAULT]))) == [6, 2]


def test_a_limit_moves_the_cut_and_more_micro_batches_in_flight_move_it_further() -> None:
    free = split(LAYERS, objective([DEFAULT] * 2))
    assert layers(free) == [4, 4]
    limit = free.estimates.nbytes[0] - 4 * 72 * 4  # but one layer's parameters less
    found = split(LAYERS, objective([DEFAULT] * 2, limits=(limit, None)))
    assert layers(found) == [3, 5]
    assert found.estimates.nbytes[0] <= limit
    many = objective([DEFAULT] * 2, limits=(limit, None), in_flight=(19, 1))
    assert layers(split(LAYERS, many)) == [1, 7]
    again = split(LAYERS, replace(many, remat=(FULL, FULL)))
    assert layers(again) == [2, 6]
    assert again.estimates.nbytes[0] <= limit


def test_a_stage_that_does_not_fit_is_named_by_its_ops() -> None:
    with pytest.raises(
        PartitionError, match=r"stage 1 does not fit its device: \d+ bytes"
    ) as error:
        split(LAYERS, objective([DEFAULT] * 2, limits=(3000, 3000)))
    assert "ops linear" in str(error.value)
    assert "to tanh_7" in str(error.value)


def test_the_cut_chooses_the_policies_too() -> None:
    """Against every cut of four layers with every policy for each stage, under falling limits."""
    annotated = annotate(captured_of(Layers(4), torch.randn(4, 8)))
    plain = objective([DEFAULT] * 3, in_flight=(40, 20, 10))
    costs = {
        remat: OpCosts(annotated, replace(plain, remat=remat))
        for remat in product(LADDER, repeat=3)
    }
    calls = next(iter(costs.values())).ops
    every = []
    for a, b in combinations(range(1, len(calls)), 2):
        stage_of = [0] * a + [1] * (b - a) + [2] * (len(calls) - b)
        for of in costs.values():
            assignment = {n: (k,) for n, k in zip(of.ops, stage_of, strict=True)}
            every.append(estimate_assignment(of, assignment))
    most = max(split(annotated, plain).estimates.nbytes)
    last, chosen, failed = 0.0, set(), 0
    for percent in range(120, 5, -5):
        limits = (most * percent // 100,) * 3
        several = replace(plain, remat=(LADDER,) * 3, limits=limits)
        fitting = [one for one in every if one.fits(limits)]
        if not fitting:
            failed += 1
            with pytest.raises(PartitionError, match="does not fit its device"):
                split(annotated, several)
            continue
        best = min(max(one.seconds) for one in fitting)
        cut = split(annotated, several)
        assert max(cut.estimates.nbytes) <= limits[0]
        assert best * (1 - 1e-9) <= cut.estimates.bottleneck <= best * (1 + SLACK)
        assert best >= last
        last = best
        chosen |= set(cut.estimates.remat)
        single = split(annotated, replace(several, remat=cut.estimates.remat))
        assert single.estimates.seconds == pytest.approx(cut.estimates.seconds)
        for k, policy in enumerate(cut.estimates.remat):  # no stage could recompute less
            for lighter in LADDER[: LADDER.index(policy)]:
                remat = tuple(lighter if j == k else p for j, p in enumerate(cut.estimates.remat))
                assignment = {n: (j,) for j, part in enumerate(cut.ops) for n in part}
                assert not estimate_assignment(
                    OpCosts(cut.annotated, replace(several, remat=remat)), assignment
                ).fits(limits)
    assert failed > 0
    assert {NONE, FULL} < chosen


def test_corrections_count_for_their_stage_and_policy() -> None:
    limits = (10**6,) * 2
    wanted = objective([DEFAULT] * 2, remat=((NONE, FULL),) * 2, limits=limits)
    assert split(LAYERS, wanted).estimates.remat == (NONE, NONE)
    plain = split(LAYERS, wanted).estimates
    missed = {(0, NONE): 10**6 - 1, (1, NONE): -100}
    found = split(LAYERS, replace(wanted, corrections=missed)).estimates
    assert found.remat == (FULL, NONE)
    assert split(LAYERS, replace(wanted, corrections={(0, FULL): 10**6})).estimates == plain
    tight = replace(wanted, limits=(10**6, plain.nbytes[1] - 1), corrections={(1, FULL): 10**6})
    assert sum(layers(split(LAYERS, tight))[:1]) > 4
    again = split(LAYERS, replace(tight, corrections=missed | tight.corrections))
    assert layers(again)[1] == 4


def test_measured_times_replace_the_devices() -> None:
    nodes = [n.name for n in LAYERS.captured.graph_module.graph.nodes if n.name in LAYERS.costs]
    times = {name: CallSeconds(1.0, 2.0, 1.0) for name in nodes}
    times[nodes[0]] = CallSeconds(30.0, 9.0, 1.0)
    cut = split(LAYERS, objective([DEFAULT] * 2, times=times))
    assert len(cut.ops[0]) <= 2
    assert cut.estimates.bottleneck == 42.0
    assert cut.estimates.lower_bound == pytest.approx((39 + 15 * 3) / 2)
    with pytest.raises(OptionError, match="`times`") as error:
        split(LAYERS, objective([DEFAULT] * 2, times={nodes[0]: times[nodes[0]]}))
    assert error.value.node == nodes[1]


class Bottle(nn.Module):
    """Wide values, but for one; the middle of the work is where they are wide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in [(512, 512), (512, 4), (4, 512), *[(512, 512)] * 3]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_slow_link_moves_the_cut_to_where_less_crosses() -> None:
    annotated = annotate(captured_of(Bottle(), torch.randn(4, 512)))
    slow = replace(DEFAULT, link=Link(0.001))
    assert layers(split(annotated, objective([DEFAULT] * 2))) == [4, 2]
    cut = split(annotated, objective([slow] * 2))
    assert layers(cut) == [2, 4]
    assert cut.stages[1].receives == ("tanh_1",)


def test_equal_devices_are_cut_within_the_slack_of_the_bound_where_costs_are_fine() -> None:
    _, _, annotated = known("gpt2")
    costs = split(annotated, objective_of([DEFAULT] * 2, SIZE)).estimates
    assert costs.bottleneck <= costs.lower_bound * (1 + SLACK) * 1.05


def test_the_gap_without_a_bound_is_none() -> None:
    assert StageEstimates((0.0,), (0,), (FULL,)).gap == 0.0
    assert dataclasses.replace(
        StageEstimates((2.0, 3.0), (0, 0), (FULL, NONE), 2.5)
    ).gap == pytest.approx(0.2)
