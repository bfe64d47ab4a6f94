"""Another capture of a model is cut as the first one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.passes.split import EarlierCut
from autopipe.passes.split.follow_cut import follow_cut
from autopipe.passes.split.op_costs import OpCosts
from autopipe.passes.split.op_groups import OpGroups
from tests.support.agreement import assert_close, pipelined


class Model(nn.Module):
    """In training with a loss and dropout; its last layer is used in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.only_in_evaluation = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x), 0.25, self.training).tanh()
        return x.sum() if self.training else self.only_in_evaluation(x)


def owners(pipe: Any) -> dict[str, int]:
    return dict(EarlierCut.of(pipe._programs.last[0].split).owners)


@pytest.mark.parametrize("first", [True, False], ids=["training first", "evaluation first"])
def test_parameters_stay_in_their_stages_in_other_modes(first: bool) -> None:
    model = Model().double()
    pipe, x = pipelined(model, devices=3), torch.randn(6, 6, dtype=torch.float64)
    pipe.train(first)(x)
    before = owners(pipe)
    pipe.train(not first)(x)
    after = owners(pipe)
    common = before.keys() & after.keys()
    assert len(common) == 8
    assert {n: before[n] for n in common} == {n: after[n] for n in common}
    model.eval()
    assert_close(pipe.eval()(x), model(x))


def groups_of(pipe: Any) -> OpGroups:
    compiled = pipe._programs.last[0]
    from autopipe.passes.split import objective_of

    annotated = compiled.split.annotated
    devices = compiled.options.stage_models
    chunks, remat = compiled.options.resolved
    objective = objective_of(devices, 2, remat=remat, in_flight=(chunks,) * len(devices))
    return OpGroups.of(OpCosts(annotated, objective))


def test_the_same_graph_gets_the_same_stages() -> None:
    pipe = pipelined(Model(), devices=3)
    pipe(torch.randn(6, 6))
    split = pipe._programs.last[0].split
    found = follow_cut(EarlierCut.of(split), groups_of(pipe))
    assert {n.name: k for n, k in found.items()} == {
        n.name: split.duplicated.get(n.name, (k,)) for k, ops in enumerate(split.ops) for n in ops
    }


def test_no_op_is_before_its_parameters_and_operands() -> None:
    pipe = pipelined(Model(), devices=3)
    pipe(torch.randn(6, 6))
    last = {f"layers.{i}.{name}": 2 - i % 3 for i in range(4) for name in ("weight", "bias")}
    groups = groups_of(pipe)
    found = follow_cut(EarlierCut((), last), groups)
    inputs = groups.costs.inputs
    for node, (stage, *_) in found.items():
        for source in node.all_input_nodes:
            item = inputs.get(source.name)
            assert item is None or stage >= last.get(item.target, 0)
            assert source not in found or stage >= found[source][0]
