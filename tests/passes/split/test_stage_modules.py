"""Stages in words: the paths of their modules. Covers split/stage_modules.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.devices import DEFAULT
from autopipe.passes.ir.split import Split
from autopipe.passes.split.allowed_cuts import CutAt
from autopipe.passes.split.cut import split
from autopipe.passes.split.objective import objective_of
from autopipe.passes.split.stage_modules import modules_by_stage
from tests.support.programs import captured_of


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x)) * 2


class Model(nn.Module):
    """Layers, and at the end what is in no module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sin().cos()


def cut(stages: int, *starts: str) -> Split:
    """Cut where these modules start; without any, where it balances."""
    annotated = annotate(captured_of(Model(), torch.randn(4, 4)))
    cut_at = CutAt(starts=frozenset(starts) or None)
    return split(annotated, objective_of([DEFAULT] * stages, 2, cut_at=cut_at))


def test_whole_modules_are_named_by_the_outermost() -> None:
    assert modules_by_stage(cut(1)) == ("layers.0 … layers.2",)
    assert modules_by_stage(cut(3, "layers.1", "layers.2")) == ("layers.0", "layers.1", "layers.2")


def test_parts_of_modules_are_named_also_in_stages_without_parameters() -> None:
    first, second, third = modules_by_stage(cut(3, "layers.1.act", "layers.2"))
    assert (first, second, third) == ("layers.0 … layers.1.linear", "layers.1.act", "layers.2")


def test_a_stage_with_no_whole_module_or_none_at_all() -> None:
    """In stages of one op each: the product after `act` is only a part of the layer."""
    assert modules_by_stage(cut(11))[-4:] == ("layers.2.act", "layers.2", "", "")


def test_ops_of_several_stages_count_in_the_first() -> None:
    found = cut(2, "layers.1")
    repeated = {n.name: (0, 1) for n in found.ops[1] if "layers.1" in n.meta.get("modules", ())}
    assert len(repeated) == 3
    assert modules_by_stage(replace(found, duplicated=repeated))[1] == "layers.2"
