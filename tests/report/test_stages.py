"""`pipe.stages`: boundary tensors in the batch size B, and the same tensors in the plan.

Covers report/memory_view.py.
"""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor, nn

import autopipe
from autopipe.planning.plan_parts import EACH
from autopipe.report.stages import BoundaryTensor

BATCH, WIDTH = 6, 4


class Skip(nn.Module):
    """Two layers; the input is used in both, and so is the first layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.layers[0](x))
        return h, torch.tanh(self.layers[1](h)) @ self.layers[0].weight + x


@pytest.fixture(scope="module")
def pipe() -> autopipe.Pipeline:
    return autopipe.compile(Skip(), ["cpu"] * 2, 2, args=(torch.randn(BATCH, WIDTH),))


def test_boundary_tensors_are_described_in_the_batch_size(pipe: autopipe.Pipeline) -> None:
    first, second = pipe.stages
    B = sympy.Symbol("B")
    (x,) = first.inputs
    assert {str(s) for s in x.nbytes.free_symbols} == {"B"}
    by_kind = {b.kind: b for b in second.inputs}
    assert set(by_kind) == {"parameter", "activation", "input"}
    weight, h = by_kind["parameter"], by_kind["activation"]
    assert (x.kind, x.source, x.targets, x.returned) == ("input", None, (0, 1), False)
    assert (weight.source, weight.targets, weight.returned) == (0, (1,), False)
    assert (h.source, h.targets, h.returned) == (0, (1,), True)
    assert (h.dtype, len(h.shape), h.shape[1]) == (torch.float32, 2, WIDTH)
    assert str(h.shape[0]) == "B"
    assert str(h.nbytes) == str(4 * WIDTH * B)
    assert weight.nbytes == 4 * WIDTH * WIDTH
    assert str(h) == f"{h.name}: float32[B, {WIDTH}] stage 0 -> stage 1, caller"
    assert str(x) == f"x: float32[B, {WIDTH}] caller -> stage 0, stage 1"
    assert h in first.outputs


def test_the_plan_has_the_same_tensors(pipe: autopipe.Pipeline) -> None:
    received = {b.name: b for stage in pipe.stages for b in stage.inputs}
    size = max(pipe.plan.sizes)
    for c in pipe.plan.crossings:
        tensor = received.pop(c.name)
        assert c == tensor.at(size, gradient=c.gradient)
        assert str(c) == str(tensor)
        assert c.gradient == (EACH if c.kind == "parameter" else None)
    assert not received


def test_a_stage_runs_by_hand(pipe: autopipe.Pipeline) -> None:
    first, _ = pipe.stages
    x = torch.randn(3, WIDTH)
    own = [pipe.model.get_parameter(name) for name in first.parameters]
    outputs = dict(zip(first.outputs, first.graph_module(*own, x), strict=True))
    (h,) = (value for b, value in outputs.items() if b.kind == "activation")
    assert all(isinstance(b, BoundaryTensor) for b in outputs)
    torch.testing.assert_close(h, pipe.model(x)[0])
    assert first.code.count("torch.ops.aten") >= 2


def test_the_texts_of_a_pipeline_are_short() -> None:
    """Of what a notebook shows: each is a few lines, and HTML."""
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)])
    pipe = autopipe.compile(layers, 18, 2)
    pipe(torch.randn(4, 4)).sum().backward()
    lines = repr(pipe.stages).splitlines()
    assert lines[0].startswith("Stage 0 on cpu: 0")
    assert pipe.stages[17].modules.endswith("19")
    assert lines[-1] == "… 2 more"
    assert len(lines) == 17
    assert repr(pipe.stages[1:]).count("Stage") == 17, "a slice is a tuple"
    assert pipe.stages._repr_html_().count("<tr>") == 19
    assert repr(pipe.memory).endswith("; … 14 more)")
    assert pipe.memory._repr_html_().count("<tr>") == 19
    assert f"{pipe.memory.stages[0].peak} B" in repr(pipe.memory)
    assert repr(pipe.plan).startswith("Plan(Sequential, 18 stages, 2 micro-batches, ")
