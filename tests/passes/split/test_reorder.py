"""Cuts of random orders of the test models' calls: bit-equal to the graph in that order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import autopipe
from autopipe import program_cache
from autopipe.call_signature import flatten
from autopipe.passes.ir.captured import Annotated
from autopipe.passes.ir.split import Split
from autopipe.passes.split.cut import split
from autopipe.passes.split.op_costs import OpCosts
from autopipe.passes.split.op_groups import OpGroups
from autopipe.passes.split.replay_plan import PlannedCut
from tests.support.models import MODELS
from tests.support.programs import objective_for
from tests.support.reference import objective, over_chunks

pytestmark = pytest.mark.few(1)

SIZE = 2


def any_cut(found: Annotated, K: int, seed: int) -> PlannedCut:
    """The plan of a cut of a random order of what may be parted."""
    costs, generator = OpCosts(found, objective_for(K, SIZE)), random.Random(seed)
    groups = OpGroups.of(costs)
    dag = groups.dag([0] * len(groups.starts))
    order: list[int] = []
    while len(order) < len(groups.starts):
        done = set(order)
        ready = [v for v, before in enumerate(dag.before) if v not in done and done >= {*before}]
        order.append(generator.choice(ready))
    starts = sorted(generator.sample(range(1, len(order)), K - 1))
    stage_of = groups.stage_of(order, starts)
    stages = [stage_of[node] for node in costs.ops]
    pairs = zip(costs.ops, [-1, *stages], stages, strict=False)
    return PlannedCut("", (), tuple((node.name, k) for node, before, k in pairs if k != before))


def in_any_order(monkeypatch: pytest.MonkeyPatch, model: nn.Module, args: Any, K: int) -> Any:
    """A pipeline whose stages are a cut of a random order, in micro-batches of two."""

    def cut(annotated: Annotated, *given: Any, **options: Any) -> Split:
        return split(
            annotated, objective_for(K, SIZE), planned=any_cut(annotated, K, 2), must_fit=False
        )

    monkeypatch.setattr(program_cache, "cut_into_stages", cut)
    pipe = autopipe.compile(model, ["cpu"] * K, 2, args=args[0], kwargs=args[1])
    monkeypatch.undo()
    return pipe


@pytest.mark.parametrize("name", [n for n, e in MODELS.items() if not e.random])
def test_a_cut_of_any_order_is_bit_equal_to_its_captured_graph(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = MODELS[name].make()
    args = inputs(4)
    pipe = in_any_order(monkeypatch, model, args, 3)
    assert pipe.captured.original_positions or name == "two_inputs"  # which has one order only
    leaves, _ = flatten(*args)
    truth = over_chunks(pipe.captured, model, leaves, 2)
    result = pipe(*args[0], **args[1])
    objective(result).backward()
    pairs = zip(tree_leaves(result), tree_leaves(truth.result), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
    for target, gradient in truth.parameters.items():
        if gradient is None:
            assert model.get_parameter(target).grad is None
        else:
            assert torch.equal(model.get_parameter(target).grad, gradient), target
    for target, buffer in truth.buffers.items():
        assert torch.equal(model.get_buffer(target), buffer), target


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n, e in MODELS.items() if e.random])
def test_a_cut_of_any_order_draws_what_one_stage_draws(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for K in (1, 3):
        model, inputs = MODELS[name].make()
        args = inputs(4)
        if K == 1:
            pipe = autopipe.compile(model, ["cpu"], 2, args=args[0], kwargs=args[1])
        else:
            pipe = in_any_order(monkeypatch, model, args, K)
        torch.manual_seed(3)
        results.append([x for x in tree_leaves(pipe(*args[0], **args[1])) if isinstance(x, Tensor)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
