"""Models cut in time, and what their tests read off a cut stage."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, fx, nn

from autopipe.passes.ir.phased import Phased, StagePhases
from autopipe.passes.ir.split import Split
from autopipe.passes.remat_policies import POLICIES
from autopipe.passes.split.cut import split
from tests.support.programs import calls, known, node, objective_for, phased_of

MODEL_NAMES = ["gpt2", "t5", "resnet", "unet", "fan_out", "tied", "two_inputs", "integer_boundary"]
SIZE = 2
STAGES = 3


@functools.cache
def cut_model(name: str) -> Split:
    return split(known(name)[2], objective_for(STAGES, SIZE))


def phased_model(name: str, remat: str) -> Phased:
    model, inputs, _ = known(name)
    return phased_of(cut_model(name), model, SIZE, inputs(SIZE), remat=remat)


def every(name: str, remat: str) -> list[StagePhases]:
    return list(phased_model(name, remat).stages)


each_model = pytest.mark.parametrize("name", [*MODEL_NAMES, "gpt2_dropout"])
each_policy = pytest.mark.parametrize("remat", [policy.name for policy in POLICIES])


def parts(stage: StagePhases) -> dict[str, list[fx.Node]]:
    """The graph's placeholders by group; results stand in `stage.results()`."""
    ctx, *rest = [n for n in stage.graph.nodes if n.op == "placeholder"]
    groups: dict[str, list[fx.Node]] = {"ctx": [ctx]}
    for group in ("state", "receives", "tangents"):
        count = len(getattr(stage, group))
        groups[group], rest = rest[:count], rest[count:]
    assert rest == []
    return groups


def phase_nodes(stage: StagePhases, letters: str) -> set[fx.Node]:
    return {n for n in calls(stage.graph) if stage.phase_of[n.name] in letters}


def saved_in(stage: StagePhases) -> list[fx.Node]:
    return [node(stage.graph, name) for name in stage.saved]


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x
