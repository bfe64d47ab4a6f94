"""Sums of stages: FLOPs against each stage's joint graph, memory against GPipe's Table 1."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from autopipe.passes.cost.node_costs import annotate, call_seconds
from autopipe.passes.cost.stage_cost import cost_of_stage
from autopipe.passes.devices import DEFAULT, DEVICES
from autopipe.passes.ir.phased import StagePhases
from autopipe.passes.ir.split import Split
from autopipe.passes.ir.values import at_batch
from autopipe.passes.split.cut import split
from benchmarks.transformer_l import on_meta
from tests.support.models import MODELS
from tests.support.programs import captured_of, known, objective_for, phased_of, split_of

pytestmark = pytest.mark.few(2)

SIZE, STAGES = 3, 3


def counted(stage: StagePhases, letters: str) -> int:
    """FLOPs of a joint graph's calls in some phases, by torch's formulas."""
    flops = 0
    for node in stage.graph.nodes:
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if formula is None or stage.phase_of[node.name] not in letters:
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        flops += int(formula(*args, **kwargs, out_val=node.meta["val"]))
    return flops


@pytest.mark.parametrize("name", [n for n, entry in MODELS.items() if not entry.random])
def test_flops_of_stages_are_those_of_their_joint_graphs(name: str) -> None:
    """What is run, stage by stage: F once, R (what "full" runs again), B and W."""
    model, inputs, annotated = known(name)
    cut = split(annotated, objective_for(STAGES, SIZE))
    with sdpa_kernel(SDPBackend.MATH):
        phased = phased_of(cut, model, SIZE, inputs(SIZE), remat="full")
    for stage, phases in zip(cut.stages, phased.stages, strict=True):
        cost = cost_of_stage(cut, stage, SIZE)
        assert at_batch(cost.flops, SIZE) == counted(phases, "F")
        # A product that lays its argument out anew counts as run again, if that is all that is.
        again = at_batch(cost.recompute_flops, SIZE) - counted(phases, "R")
        products = [
            at_batch(annotated.costs[n.name].forward_flops, SIZE) for n in cut.ops[stage.index]
        ]
        spared = [flops for flops in products if flops][-1:] if name == "transformer" else []
        assert again in (0, *spared)
        assert at_batch(cost.backward_flops, SIZE) == counted(phases, "BW")


def test_recomputing_leaves_out_what_nobody_reads() -> None:
    """The last layer's product is not run again: nothing saves its result."""
    cut = split_of(
        nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)), 1, torch.ones(4, 6)
    )
    cost = cost_of_stage(cut, cut.stages[0], 4)
    assert at_batch(cost.flops, 4) == 4 * 2 * (6 * 10 + 10 * 3)
    assert at_batch(cost.recompute_flops, 4) == 4 * 2 * (6 * 10)
    assert 0 < cost.recompute_seconds < cost.forward_seconds


# ------------------------------------------------------------------------------- parameters


TABLE_1 = {3: "3.15", 13: "8.78"}
"""L → GiB of parameter memory, GPipe (arXiv 1811.06965), Table 1, one partition each."""


@functools.cache
def transformer_l(layers: int, stages: int) -> Split:
    model, args = on_meta(layers, 4)
    return split(annotate(captured_of(model, *args)), objective_for(stages, 1))


@pytest.mark.parametrize("layers", TABLE_1)
def test_parameter_memory_is_gpipes(layers: int) -> None:
    """12 bytes a parameter: its value and eight bytes of optimizer state."""
    cut = transformer_l(layers, 1)
    cost = cost_of_stage(cut, cut.stages[0], 1)
    nbytes = cost.parameter_bytes + cost.optimizer_bytes
    assert nbytes == 12 * (layers * (4 * 2048**2 + 2 * 2048 * 8192) + 2 * 32000 * 2048)
    assert f"{nbytes / 2**30:.2f}" == TABLE_1[layers]
    assert cost.gradient_bytes == cost.parameter_bytes


def test_parameters_are_shared_out_over_stages() -> None:
    whole = transformer_l(3, 1)
    parts = transformer_l(3, 3)
    (one,) = (cost_of_stage(whole, s, 1) for s in whole.stages)
    three = [cost_of_stage(parts, s, 1) for s in parts.stages]
    for fact in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert sum(getattr(c, fact) for c in three) == getattr(one, fact)
        assert all(getattr(c, fact) > 0 for c in three)


def test_frozen_parameters_have_no_gradient_and_no_state() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[0].requires_grad_(False)
    cut = split_of(model, 1, torch.randn(2, 4))
    cost = cost_of_stage(cut, cut.stages[0], 2)
    assert cost.parameter_bytes == 4 * (16 + 4 + 16)
    assert cost.gradient_bytes == 4 * 16
    assert cost.optimizer_bytes == 8 * 16
    assert cost_of_stage(cut, cut.stages[0], 2, state_bytes=4).optimizer_bytes == 4 * 16


def test_a_shared_parameter_is_held_once_and_lent() -> None:
    model, inputs = MODELS["tied"].make()
    args, kwargs = inputs(4)
    cut = split_of(model, 3, *args, **kwargs)
    costs = [cost_of_stage(cut, s, 2) for s in cut.stages]
    assert sum(c.parameter_bytes for c in costs) == sum(
        p.numel() * p.itemsize for p in model.parameters()
    )
    borrowers = sum(bool(s.shared) for s in cut.stages)
    assert borrowers > 0
    assert sum(c.shared_copy_bytes for c in costs) == borrowers * 20 * 12 * 4


def test_half_precision_has_state_per_element() -> None:
    cut = split_of(nn.Linear(4, 4, bias=False).half(), 1, torch.randn(2, 4, dtype=torch.half))
    cost = cost_of_stage(cut, cut.stages[0], 2)
    assert (cost.parameter_bytes, cost.gradient_bytes, cost.optimizer_bytes) == (32, 32, 128)


# ------------------------------------------------------------------------------- seconds


def test_seconds_of_a_stage_are_its_calls() -> None:
    _, _, annotated = known("unet")
    cut = split(annotated, objective_for(STAGES, SIZE))
    for stage, own in zip(cut.stages, cut.ops, strict=True):
        cost = cost_of_stage(cut, stage, SIZE)
        times = [call_seconds(annotated.costs[n.name], DEFAULT, SIZE) for n in own]
        assert cost.seconds == pytest.approx(sum(t.forward + t.backward for t in times))
        assert cost.seconds == pytest.approx(cost.forward_seconds + cost.backward_seconds)
        assert 0 < cost.recompute_seconds <= cost.forward_seconds


def test_a_stage_is_faster_on_a_gpu() -> None:
    cut = transformer_l(3, 3)

    def time(name: str) -> float:
        return cost_of_stage(cut, cut.stages[1], 4, DEVICES[name]).seconds

    assert time("h100") < time("a100-80gb") < time("cpu-core")


def test_tensors_of_the_model_are_on_no_device() -> None:
    """Transformer-L at its full width has no memory here."""
    model, args = on_meta(1, 4)
    tensors: list[Any] = [*model.parameters(), *pytree.tree_leaves(args)]
    assert all(isinstance(t, Tensor) and t.is_meta for t in tensors)
