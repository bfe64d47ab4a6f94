"""Cuts of other orders than the captured one: against brute force, and to the bit.

Covers split/replay_plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import PlanError, VerifyError
from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.devices import DEFAULT, Device, Link
from autopipe.passes.ir import Split
from autopipe.passes.ir.captured import Annotated
from autopipe.passes.remat_policies import NONE
from autopipe.passes.split.allowed_cuts import CutAt
from autopipe.passes.split.assign_stages import SLACK
from autopipe.passes.split.cut import split
from autopipe.passes.split.objective import Objective, objective_of
from autopipe.passes.split.op_costs import OpCosts
from autopipe.passes.split.replay_plan import planned_cut_of
from tests.support.programs import captured_of, run_stages, split_of

SIZE = 2


class Branches(nn.Module):
    """Layers of unequal width on one input, one after another; then their sum, as in inception."""

    def __init__(self, widths: Sequence[int], chance: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, width) for width in widths)
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        found = [F.dropout(layer(x), self.chance, self.training) for layer in self.layers]
        return torch.cat(found, 1)


class Towers(nn.Module):
    """Two towers, one after the other, of unequal cost, and their join (as GraphPipe's)."""

    def __init__(self, left: int, right: int, layers: int) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Linear(left, left) for _ in range(layers))
        self.right = nn.ModuleList(nn.Linear(right, right) for _ in range(layers))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        for layer in self.left:
            a = layer(a)
        for layer in self.right:
            b = layer(b)
        return torch.cat([a, b], 1)


def annotated(model: nn.Module, *args: Tensor) -> Annotated:
    return annotate(captured_of(model, *args))


FOUR = annotated(Branches([1600, 1600, 1100, 1100]), torch.randn(4, 256))
CASES = {
    "branches": (FOUR, 2),
    "uneven branches": (annotated(Branches([900, 200, 500, 800, 600]), torch.randn(4, 256)), 3),
    "towers": (annotated(Towers(600, 690, 3), torch.randn(4, 600), torch.randn(4, 690)), 3),
}


def convex_cuts(calls: Sequence[fx.Node], K: int) -> Iterator[dict[fx.Node, int]]:
    for stages in product(range(K), repeat=len(calls)):
        stage_of = dict(zip(calls, stages, strict=True))
        edges = ((a, b) for b in calls for a in b.all_input_nodes if a in stage_of)
        if len(set(stages)) == K and all(stage_of[a] <= stage_of[b] for a, b in edges):
            yield stage_of


def largest(costs: OpCosts, stage_of: dict[fx.Node, int]) -> float:
    """Seconds of the largest stage, by definition."""
    objective = costs.objective
    stages = [0.0] * objective.stages
    for k, device in enumerate(objective.devices):
        each = costs.seconds(device, objective.policies(k)[0])
        own = [node for node, stage in stage_of.items() if stage == k]
        stages[k] += sum(each[node] for node in own)
        for source in {s for node in own for s in node.all_input_nodes}:
            if source in stage_of and stage_of[source] < k:
                stages[k] += 2 * device.link.seconds(4 * SIZE * source.meta["val"].shape[1])
    return max(stages)


def on(device: Device, K: int) -> Objective:
    return Objective(SIZE, (device,) * K, (NONE,) * K, (1,) * K, (None,) * K)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", [DEFAULT, replace(DEFAULT, link=Link(20.0, 1e-6))])
def test_no_convex_cut_is_better_by_more_than_the_slack(name: str, device: Device) -> None:
    found, K = CASES[name]
    objective = on(device, K)
    costs = OpCosts(found, objective)
    every = [(largest(costs, cut), cut) for cut in convex_cuts(costs.ops, K)]
    best = min(seconds for seconds, _ in every)
    contiguous = min(s for s, cut in every if [*cut.values()] == sorted(cut.values()))
    assert contiguous > best * (1 + SLACK) ** 2  # else there is nothing to find
    cut = split(found, objective)
    assert best * (1 - 1e-9) <= cut.estimates.bottleneck <= best * (1 + SLACK) ** 2
    assert cut.estimates.lower_bound <= best * (1 + 1e-9)
    assert cut.captured.original_positions
    cut.verify()


def test_the_captured_order_is_kept_where_it_is_good() -> None:
    even = annotated(Branches([900] * 4), torch.randn(4, 256))
    cut = split(even, on(DEFAULT, 2))
    assert not cut.captured.original_positions
    assert cut.captured is even.captured
    assert cut.estimates.gap <= SLACK


@pytest.mark.parametrize("after", [1, 3])
def test_of_equal_cuts_the_one_between_modules_is_chosen(after: int) -> None:
    """As much crosses a cut before or after each small op, and balance hardly differs."""
    before = 4 - after

    def acts(count: int) -> list[nn.Module]:
        return [nn.Tanh() for _ in range(count)]

    layers = [nn.Linear(2048, 2048) for _ in range(2)]
    blocks = [nn.Sequential(*acts(before), layer, *acts(after)) for layer in layers]
    cut = split_of(nn.Sequential(*blocks), 2, torch.randn(4, 2048))
    assert cut.ops[0][-1].meta["modules"][0] == "0"
    assert cut.ops[1][0].meta["modules"][0] == "1"


def test_limits_hold_in_the_chosen_order() -> None:
    """The captured order has no cut within these limits: two branches of 1500 are too much."""
    free = split(FOUR, on(DEFAULT, 2))
    limit = max(free.estimates.nbytes)
    cut = split(FOUR, replace(on(DEFAULT, 2), limits=(limit, limit)))
    assert max(cut.estimates.nbytes) <= limit
    assert cut.captured.original_positions


def test_only_the_order_changes() -> None:
    cut = split(FOUR, on(DEFAULT, 2))
    before = list(FOUR.captured.graph_module.graph.nodes)
    after = list(cut.captured.graph_module.graph.nodes)
    assert [before[cut.captured.original_position(at)].name for at in range(len(after))] == [
        node.name for node in after
    ]
    assert [n.name for ops in cut.ops for n in ops] == [
        n.name for n in after if n.op == "call_function" and n.name in FOUR.costs
    ]
    x = torch.randn(3, 256)
    values = [
        x if item.name == "x" else torch.randn([int(s) for s in item.spec.shape])
        for item in cut.captured.inputs
    ]
    expected = FOUR.captured.graph_module(*values)
    names = {i.name: v for i, v in zip(cut.captured.inputs, values, strict=True)}
    found = run_stages(cut, names)
    assert torch.equal(found[cut.captured.outputs[0].name], expected[0])
    assert torch.equal(cut.captured.graph_module(*values)[0], expected[0])
    broken = replace(cut.captured, original_positions=cut.captured.original_positions[:-1])
    with pytest.raises(VerifyError, match="the original positions are not a permutation"):
        broken.verify()


class Stepped(nn.Module):
    """Branches, one of which keeps a running sum that the last one reads, and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, w) for w in (1500, 1500, 1200, 1200))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x)
        self.seen += 1
        second = self.layers[1](x)
        second[:, 0] += 1
        third = self.layers[2](x) * self.seen
        return torch.cat([first, torch.relu_(second), third, self.layers[3](x)], 1)


def test_writes_and_what_reads_them_keep_their_order() -> None:
    torch.manual_seed(0)
    model, x = Stepped(), torch.randn(6, 256)
    expected = [model(x), model(x)]
    model.seen.zero_()  # type: ignore[operator]
    pipe = autopipe.compile(model, ["cpu"] * 2, 3)
    for y in expected:
        torch.testing.assert_close(pipe(x), y)
    assert pipe.captured.original_positions
    whole = annotated(Stepped(), x)
    cut = split(whole, on(DEFAULT, 2))
    assert cut.captured.original_positions
    names = [n.name for n in cut.captured.graph_module.graph.nodes]
    for node in whole.captured.graph_module.graph.nodes:
        for source in node.all_input_nodes:
            assert names.index(source.name) < names.index(node.name)


# ------------------------------------------------------------------------------- random numbers


def runs(chance: float) -> Iterator[tuple[int, Tensor, dict[str, Tensor], Any]]:
    for devices in (1, 2, 3):
        torch.manual_seed(0)
        model, x = Branches([1500, 1500, 1200, 1200], chance), torch.randn(6, 256)
        pipe = autopipe.compile(model, ["cpu"] * devices, 3)
        torch.manual_seed(7)
        found = pipe(x)
        found.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        yield devices, found, gradients, pipe.captured


def test_a_program_in_another_order_draws_the_same_numbers() -> None:
    """Dropout in each branch: two stages are made in another order, one stage is not."""
    (_, first, gradients, captured), *others = runs(0.5)
    assert not captured.original_positions
    assert any(other.original_positions for *_, other in others)
    assert (first == 0).any()
    for _, found, others_gradients, _ in others:
        assert torch.equal(found, first)
        assert gradients.keys() == others_gradients.keys()
        assert all(torch.equal(g, others_gradients[n]) for n, g in gradients.items())


# ------------------------------------------------------------------------------- plans


def test_a_plan_reproduces_the_order() -> None:
    objective = on(DEFAULT, 2)
    cut = split(FOUR, objective)
    planned = planned_cut_of(cut)
    assert planned.runs
    other = split(FOUR, objective, planned=planned, must_fit=True)
    assert str(other) == str(cut)
    assert other.captured.original_positions == cut.captured.original_positions
    assert other.estimates.seconds == cut.estimates.seconds
    even = annotated(Branches([900] * 4), torch.randn(4, 256))
    assert planned_cut_of(split(even, objective)).runs == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda runs: runs[1:],  # no stage for the first call
        lambda runs: (*runs, ("nothing", 1)),
        lambda runs: tuple((name, 1 - k) for name, k in runs),  # backward
        lambda runs: tuple((name, 0) for name, _ in runs),  # an empty stage
        lambda runs: (runs[0], *reversed(runs[1:]), runs[0]),
    ],
)
def test_runs_of_another_graph_are_refused(change: Any) -> None:
    objective = on(DEFAULT, 2)
    planned = planned_cut_of(split(FOUR, objective))
    wrong = planned._replace(runs=change(planned.runs))
    with pytest.raises(PlanError, match="not one for this model"):
        split(FOUR, objective, planned=wrong, must_fit=True)
    assert split(FOUR, objective, planned=wrong).captured.original_positions  # left alone


def test_orders_are_searched_for_devices_that_differ() -> None:
    fast = replace(DEFAULT, fp32_flops=4e11, gbytes_per_second=160, launch_seconds=5e-7)
    objective = replace(on(DEFAULT, 2), devices=(fast, DEFAULT))
    costs = OpCosts(FOUR, objective)
    best = min(largest(costs, cut) for cut in convex_cuts(costs.ops, 2))
    found = split(FOUR, objective).estimates
    assert found.lower_bound <= best
    assert best * (1 - 1e-9) <= found.bottleneck <= 1.1 * best


def test_stages_of_a_device_are_balanced_together() -> None:
    """Twelve layers and a larger head in eight stages of four devices, first and last on the same:
    the busiest device has less to do than where each stage counts alone, and no stage is slower."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(12)]
    found = annotated(nn.Sequential(*layers, nn.Linear(64, 128)), torch.randn(SIZE, 64))
    homes = (0, 1, 2, 3, 3, 2, 1, 0)
    cut_at = CutAt(starts=frozenset(f"{k}" for k in range(1, 13)))
    alone, together = (
        split(found, objective_of([DEFAULT] * 8, SIZE, cut_at=cut_at, homes=shared))
        for shared in ((), homes)
    )

    def busiest(cut: Split) -> float:
        seconds = cut.estimates.seconds
        return max(sum(s for s, h in zip(seconds, homes, strict=True) if h == d) for d in range(4))

    assert busiest(together) <= busiest(alone) * 0.95
    assert max(together.estimates.seconds) <= max(alone.estimates.seconds) * (1 + SLACK)
