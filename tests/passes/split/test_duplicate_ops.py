"""Cheap values computed where they are used, and ops near the inputs moved: costs and bits.

Covers split/relocate_ops.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import autopipe
from autopipe import options
from autopipe.call_signature import flatten
from autopipe.errors import PlanError
from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.devices import DEFAULT, H100, Device, Link
from autopipe.passes.ir.captured import Annotated
from autopipe.passes.ir.split import Split
from autopipe.passes.remat_policies import FULL, NONE, RematPolicy
from autopipe.passes.split.cut import split
from autopipe.passes.split.duplicate_ops import duplicable_ops, duplicate_ops
from autopipe.passes.split.objective import Objective
from autopipe.passes.split.op_costs import OpCosts
from autopipe.passes.split.op_groups import OpGroups
from autopipe.passes.split.replay_plan import planned_cut_of
from autopipe.passes.split.stage_estimate import Assignment, estimate_assignment
from tests.support.programs import captured_of, run_stages
from tests.support.reference import objective, over_chunks

SIZE = 2
SLOW = replace(DEFAULT, link=Link(1.0, 30e-6))
FAST = replace(DEFAULT, link=Link(1e6, 1e-9))


class Rotary(nn.Module):
    """Layers that share a table of positions, a causal mask and a cast of the ids."""

    def __init__(self, layers: int = 4, width: int = 256) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("frequencies", torch.rand(width))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        positions = torch.arange(ids.shape[1])
        angles = positions[:, None] * self.frequencies
        turn = angles.cos() + angles.sin()
        mask = (positions[:, None] >= positions) & (ids[:, None, :] != 0)
        weights = mask.to(torch.float32)
        x = self.table(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x)) * turn + weights @ x * 0.01
        return x * self.calls


IDS = torch.randint(0, 11, (4, 32), generator=torch.Generator().manual_seed(0))
ROTARY = annotate(captured_of(Rotary(), IDS))


def on(device: Device, K: int, **change: Any) -> Objective:
    return replace(Objective(SIZE, (device,) * K, (NONE,) * K, (1,) * K, (None,) * K), **change)


def groups_of(found: Annotated, objective: Objective) -> OpGroups:
    costs = OpCosts(found, objective)
    return OpGroups(costs, range(len(costs.ops)))


def test_duplicable_ops() -> None:
    """Nothing that needs a gradient, is written, or reads what changes."""
    groups = groups_of(ROTARY, on(SLOW, 2))
    names = {str(node.target).split(".")[1] for node in duplicable_ops(groups)}
    assert names >= {"arange", "cos", "sin", "ge", "ne", "mul"}
    assert not names & {"embedding", "linear", "tanh", "add_", "matmul"}
    reads = [n for n in groups.costs.ops if any("calls" in s.name for s in n.all_input_nodes)]
    assert reads
    assert not duplicable_ops(groups) & set(reads)


class Draws(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        mask = F.dropout(torch.ones(8), 0.5) + ids
        values, _ = ids.max(1)
        return mask.cos() + values[:, None].sin()


def test_random_ops_and_ops_with_several_results_are_not_duplicable() -> None:
    found = annotate(captured_of(Draws(), torch.ones(4, 8, dtype=torch.int64)))
    duplicable = {str(node.target) for node in duplicable_ops(groups_of(found, on(SLOW, 2)))}
    assert duplicable == {"aten.ones.default"}


def test_free_transfers_duplicate_nothing() -> None:
    for K in (2, 3):
        assert not split(ROTARY, on(DEFAULT, K)).duplicated


def test_a_slow_link_duplicates_and_a_fast_one_sends() -> None:
    assert not split(ROTARY, on(FAST, 3)).duplicated
    cut = split(ROTARY, on(SLOW, 3))
    assert cut.duplicated
    sent = {n for s in cut.stages for n in s.receives if cut.routes[n].kind == "activation"}
    assert not sent & set(cut.duplicated)
    duplicable = {node.name for node in duplicable_ops(groups_of(ROTARY, on(SLOW, 3)))}
    assert set(cut.duplicated) <= duplicable
    # The mask depends on the ids, so something must be sent: the mask is, but before it is widened.
    assert {cut.routes[name].spec.dtype for name in sent & duplicable} == {torch.bool}
    widened = [n for n in cut.duplicated if cut_node(cut, n).target is torch.ops.aten.to.dtype]
    assert widened


def cut_node(cut: Split, name: str) -> fx.Node:
    return next(n for ops in cut.ops for n in ops if n.name == name)


def test_the_same_bits_with_and_without_duplicates() -> None:
    model, ids = Rotary(), IDS[:3]
    cut = split(ROTARY, on(SLOW, 3))
    values = {}
    for item in cut.captured.inputs:
        tensor = ids if item.index >= 0 else cut.captured.tensor_of(model, item)
        values[item.name] = tensor.detach().clone()
    expected = ROTARY.captured.graph_module(*[v.clone() for v in values.values()])
    found = run_stages(cut, values)
    for output, value in zip(cut.captured.outputs, expected, strict=True):
        assert torch.equal(found[output.name], value)


@pytest.mark.parametrize("device", [SLOW, FAST, H100, replace(SLOW, link=Link(0.5, 3e-6))])
@pytest.mark.parametrize("remat", [NONE, FULL], ids=lambda policy: policy.name)
def test_no_other_choice_costs_less(device: Device, remat: RematPolicy) -> None:
    """Of all sets of stages that make the cheap calls (home always does), by what stages take."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            kept = ids > 3
            wide = kept[:, :, None].expand(-1, -1, 64).to(torch.float32)
            x = torch.tanh(self.first(x)) + wide.cos().sum(2)
            return self.last(x) * wide.sum(2) + kept

    ids = torch.randint(0, 9, (4, 8))
    found = annotate(captured_of(Wide(), torch.randn(4, 8), ids))
    objective = on(device, 2, remat=(remat, remat))
    groups = groups_of(found, objective)
    costs, duplicable = groups.costs, duplicable_ops(groups)
    start = next(at for at, n in enumerate(costs.ops) if "linear_1" in n.name)
    stage_of = {n: int(at >= start) for at, n in enumerate(costs.ops)}
    assert len(duplicable) >= 4

    def seconds(assignment: Assignment) -> float:
        inputs = {
            (source, k)
            for node, stages in assignment.items()
            for k in stages
            for source in node.all_input_nodes
            if source.name == "ids"
        }
        link = device.link.seconds(costs.nbytes(next(n for n, _ in inputs)))
        return sum(estimate_assignment(costs, assignment).seconds) + link * len(inputs)

    def every() -> Any:
        early = [n for n in duplicable if stage_of[n] == 0]
        for chosen in product([(0,), (0, 1)], repeat=len(early)):
            yield {n: (k,) for n, k in stage_of.items()} | dict(zip(early, chosen, strict=True))

    best = min(map(seconds, every()))
    assert seconds(duplicate_ops(groups, stage_of)) <= best * (1 + 1e-9)


# --------------------------------------------------------------------------------- end to end


def with_device(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Let `compile` cut for other devices than it runs on."""
    monkeypatch.setattr(options, "models_of", lambda devices: (device,) * len(devices))


@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
def test_a_pipeline_with_duplicates_is_bit_equal(
    monkeypatch: pytest.MonkeyPatch, remat: str
) -> None:
    with_device(monkeypatch, SLOW)
    torch.manual_seed(0)
    model = Rotary()
    pipe = autopipe.compile(model, ["cpu"] * 3, 2, remat=remat, args=(IDS,))
    assert pipe._programs.last[0].split.duplicated
    leaves, _ = flatten((IDS,), {})
    truth = over_chunks(pipe.captured, model, leaves, 2)
    result = pipe(IDS)
    objective(result).backward()
    assert torch.equal(result, truth.result)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, truth.parameters[name])
    assert pipe.plan.starts == planned_cut_of(pipe._programs.last[0].split).starts
    assert pipe.explain()


def test_a_plan_reproduces_duplicates() -> None:
    objective = on(SLOW, 3)
    cut = split(ROTARY, objective)
    planned = planned_cut_of(cut)
    again = split(ROTARY, objective, planned=planned, must_fit=True)
    assert str(again) == str(cut)
    assert again.duplicated == cut.duplicated
    elsewhere = split(ROTARY, on(DEFAULT, 3), planned=planned, must_fit=True)
    assert str(elsewhere) == str(cut)
    name, stages = planned.duplicated[0]
    linear = next(n.name for n in cut.ops[0] if "embedding" in n.name)
    for wrong in [
        (name, (*stages, 3)),
        (name, stages[::-1]),
        (linear, (0, 1)),
        ("nothing", (0, 1)),
    ]:
        with pytest.raises(PlanError, match="not one for this model"):
            split(ROTARY, objective, planned=planned._replace(duplicated=(wrong,)), must_fit=True)


def test_values_are_sent_where_there_is_no_memory_to_duplicate_them() -> None:
    cut = split(ROTARY, on(SLOW, 3))
    sent = split(ROTARY, on(SLOW, 3), planned=planned_cut_of(cut)._replace(duplicated=()))
    assert not sent.duplicated
    assert any(a < b for a, b in zip(sent.estimates.nbytes, cut.estimates.nbytes, strict=True))
    limited = split(ROTARY, on(SLOW, 3, limits=sent.estimates.nbytes))
    assert not limited.duplicated
    assert limited.estimates.nbytes <= sent.estimates.nbytes


# --------------------------------------------------------------------------------- sources


class Late(nn.Module):
    """Positions looked up at the start, used at the end; a small table used at both ends."""

    def __init__(self, tokens: int, layers: int = 6, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, ids: Tensor, other: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers[:3]:
            x = torch.tanh(layer(x))
        y = self.table(other)
        for layer in self.layers[3:]:
            y = torch.tanh(layer(y))
        return x + y


def homes(cut: Split, text: str) -> list[int]:
    return [k for k, calls in enumerate(cut.ops) for n in calls if text in str(n.target)]


@pytest.mark.parametrize(("tokens", "length", "expected"), [(20000, 2, [0, 0]), (8, 512, [0, 1])])
def test_a_lookup_moves_to_its_table_or_to_its_user(
    tokens: int, length: int, expected: list[int]
) -> None:
    """Few rows of a large table are sent; of many of a small one the table is."""
    ids = [torch.randint(0, 8, (4, length)) for _ in range(2)]
    found = annotate(captured_of(Late(tokens), *ids))
    cut = split(found, on(replace(DEFAULT, link=Link(1.0)), 2))
    assert homes(cut, "embedding") == expected
    assert bool(cut.stages[1].shared) == (expected == [0, 1])


class Early(nn.Module):
    """Cheap calls first, which only later stages need."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(256).to(torch.float32)
        wave = ramp.cos() * ramp.sin()
        return self.layers[1](self.layers[0](x) * wave) + wave


@pytest.mark.parametrize("first", [1, 3, 5])
def test_a_stage_keeps_an_op_of_its_own(first: int) -> None:
    """Planned so that the first stage has cheap calls alone, some of which are duplicated."""
    found = annotate(captured_of(Early(), torch.randn(4, 256)))
    objective = on(SLOW, 2)
    groups = groups_of(found, objective)
    calls = groups.costs.ops
    assignment = duplicate_ops(groups, {n: int(at >= first) for at, n in enumerate(calls)})
    homes = [stages[0] for stages in assignment.values()]
    assert homes.count(0) == 1  # all others have moved to where they are needed
    assert all(0 not in assignment[n] for n in calls if assignment[n][0])
    for node in calls:
        for source in node.all_input_nodes:
            if source in assignment:
                assert assignment[source][0] <= assignment[node][0]
