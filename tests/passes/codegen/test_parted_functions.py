"""Functions in parts compute what functions without parts compute, to the bit.

Covers codegen/loose_draws.py, ir/graph_part.py.
"""

from __future__ import annotations

import dataclasses
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autopipe.errors import VerifyError
from autopipe.passes.codegen import stage_function
from autopipe.passes.codegen.parted_functions import parted_function
from autopipe.passes.codegen.program import HEADER
from autopipe.passes.codegen.source_rules import check_source
from autopipe.passes.ir import GraphPart, PhaseFunction, RandomDraw, StagePhases, phase_functions
from autopipe.runtime.load import load_source
from autopipe.runtime.random import MicroBatchContext
from tests.support.programs import CPU, phased_of, split_of

aten = torch.ops.aten


class Drawing(nn.Module):
    """Draws that read a shape, and one that reads computed probabilities."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(self.first(x)), 0.5) + torch.randn_like(x)
        x = x * torch.bernoulli(torch.sigmoid(x).detach())
        return self.last(x).pow(2).mean()


class Context(MicroBatchContext):
    """Keeps the gradients."""

    def __init__(self, draws: Any) -> None:
        self.gradients: dict[int, Tensor] = {}
        super().__init__(7, draws, 0, self.gradients.__setitem__)


def loaded(texts: list[str]) -> dict[str, Any]:
    source = "\n\n".join([HEADER.format(title="test"), *texts])
    check_source(source)
    return load_source(source)[0]


def run_both(
    stage: StagePhases, function: PhaseFunction, arguments: list[Tensor]
) -> tuple[list[Tensor], list[GraphPart]]:
    """Run a function with and without parts; return its results, which are equal."""
    name = "F_0_b4"
    texts, parts = parted_function(stage, function, CPU, name)
    found = []
    for source in ([stage_function(stage, function, CPU, name)], texts):
        ctx, taken = Context(stage.draws), list(arguments)
        results = loaded(source)[name](ctx, taken)
        assert taken == []
        found.append([*results, *(ctx.gradients[i] for i in sorted(ctx.gradients))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    return found[0], parts


@pytest.mark.parametrize("groups", [("F", "RBW"), ("F", "RB", "W"), ("F", "R", "B", "W")])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_stage_in_parts(groups: tuple[str, ...], remat: str) -> None:
    model, x = Drawing(), torch.randn(4, 6)
    cut = split_of(model, 1, x)
    (stage,) = phased_of(cut, model, 4, ((x,), {}), remat=remat).stages
    state = [model.get_parameter(i.target).detach() for i in cut.captured.inputs if i.target]
    kept: list[Tensor] = [x]
    parts = []
    for letters, function in zip(groups, phase_functions(stage, groups), strict=True):
        tangents = [torch.tensor(1.0)] if "B" in letters else []
        results, found = run_both(stage, function, [*state, *kept, *tangents])
        count = len(function.results)
        kept = results[len(stage.returns) if letters == "F" else 0 : count]
        parts += found
    assert all(n.op != "call_method" for part in parts for n in part.graph.nodes)
    forward = [p for p in parts if p.phase == "F"]
    assert len(forward) >= 2  # the draw of computed probabilities stands between two parts


def stage_of(graph: fx.Graph, phases: dict[str, str], draws: int = 0) -> StagePhases:
    returned: Any = graph.output_node().args[0]
    names = tuple(f"result{i}" for i in range(len(returned)))
    keys = tuple(RandomDraw(i, 0, False) for i in range(draws))
    none: Any = ()
    return StagePhases(
        0, graph, phases, (), (), ("x",), (), names, none, none, none, keys, torch.device("cpu")
    )


def test_the_dropout_of_gpus_is_a_draw_of_its_mask_and_a_product() -> None:
    graph = fx.Graph()
    ctx, x = graph.placeholder("ctx"), graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 6)
    doubled = graph.call_function(aten.mul.Tensor, (x, 2.0))
    doubled.meta["val"] = torch.empty(4, 6)
    drawn = graph.call_method("draw", (ctx, 0, aten.native_dropout.default, doubled, 0.25, True))
    kept, mask = graph.call_function(getitem, (drawn, 0)), graph.call_function(getitem, (drawn, 1))
    kept.meta["val"] = torch.empty(4, 6)
    mask.meta["val"] = torch.empty(4, 6, dtype=torch.bool)
    drawn.meta["val"] = (kept.meta["val"], mask.meta["val"])
    graph.output([kept, mask])
    nodes = (doubled, drawn, kept, mask)
    stage = stage_of(graph, {n.name: "F" for n in nodes}, draws=1)
    function = PhaseFunction((x,), nodes, (kept, mask), {})
    value = torch.randn(4, 6)
    texts, parts = parted_function(stage, function, CPU, "F_0_b4")
    (part,) = parts  # nothing is computed before the draw
    assert [n.target for n in part.graph.nodes if n.op == "call_function"].count(getitem) == 0
    (expected, first), (found, second) = (
        loaded(source)["F_0_b4"](Context(stage.draws), [value])
        for source in ([stage_function(stage, function, CPU, "F_0_b4")], texts)
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(found, expected)


def test_an_operator_of_another_library_is_in_no_part() -> None:
    graph = fx.Graph()
    graph.placeholder("ctx")
    x = graph.placeholder("x")
    table = graph.call_function(aten.view_as_complex.default, (x,))
    real = graph.call_function(aten.view_as_real.default, (table,))
    total = graph.call_function(aten.add.Tensor, (real, 1.0))
    x.meta["val"] = real.meta["val"] = total.meta["val"] = torch.empty(4, 2)
    table.meta["val"] = torch.empty(4, dtype=torch.complex64)
    graph.output([total])
    stage = stage_of(graph, {n.name: "F" for n in (table, real, total)})
    function = PhaseFunction((x,), (table, real, total), (total,), {})
    _, (part,) = run_both(stage, function, [torch.randn(4, 2)])
    assert [n.target for n in part.graph.nodes if n.op == "call_function"] == [aten.add.Tensor]


def test_parts_are_checked() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2)
    graph.output([x])
    part = GraphPart("F_0_b4_part_1", 0, graph, CPU, CPU)
    part.verify()
    assert (part.phase, part.arguments) == ("F", [x])
    assert "F_0_b4_part_1 on cpu" in str(part)
    called = fx.Graph()
    drawn = called.call_method("draw", (called.placeholder("ctx"),))
    called.output([drawn])
    with pytest.raises(VerifyError, match="only the runtime"):
        dataclasses.replace(part, graph=called).verify()
    x.meta["val"] = 3
    with pytest.raises(VerifyError, match="no tensor"):
        part.verify()
