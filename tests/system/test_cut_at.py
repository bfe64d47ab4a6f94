"""`cut_at`: cuts at blocks, classes and names; the same losses and gradients as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import OptionError, PartitionError, PlanError

pytestmark = pytest.mark.few(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def tokens(length: int = 5) -> Tensor:
    return torch.randint(20, (6, length), generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, **options: Any) -> autopipe.Pipeline:
    return autopipe.compile(model, devices=["cpu"] * 3, chunks=2, **options)


def stages_of_layers(pipe: autopipe.Pipeline) -> dict[str, set[int]]:
    """For each layer the stages that have ops of it."""
    found: dict[str, set[int]] = {}
    for stage in pipe.stages:
        for node in stage.graph_module.graph.nodes:
            for path in node.meta.get("modules", ()) if node.op == "call_function" else ():
                if path.startswith("layers.") and path.count(".") == 1:
                    found.setdefault(path, set()).add(stage.index)
    return found


def check(pipe: autopipe.Pipeline, model: nn.Module, *lengths: int) -> None:
    """Losses and gradients are eager's; no layer is in two stages."""
    eager = Tagger()
    eager.load_state_dict(model.state_dict())
    for length in lengths:
        expected, found = eager(tokens(length)), pipe(tokens(length))
        torch.testing.assert_close(found, expected)
        expected.backward()
        found.backward()
        assert [len(stages) for stages in stages_of_layers(pipe).values()] == [1, 1, 1]
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("cut_at", ["blocks", ["Block"], ["layers.1", "head"], Block])
def test_the_results_are_eagers_and_no_layer_is_cut(cut_at: Any) -> None:
    model = Tagger()
    check(compiled(model, cut_at=cut_at), model, 5)


def test_other_lengths_and_evaluation_follow() -> None:
    model = Tagger()
    pipe = compiled(model, cut_at="blocks")
    check(pipe, model, 5, 7)
    trained = stages_of_layers(pipe)
    torch.testing.assert_close(pipe.eval()(tokens()), model.eval()(tokens()))
    assert stages_of_layers(pipe) == trained


def test_names_are_where_stages_start() -> None:
    pipe = compiled(Tagger(), cut_at=["layers.1", "head"], args=(tokens(),))
    assert stages_of_layers(pipe) == {"layers.0": {0}, "layers.1": {1}, "layers.2": {1}}


def test_a_saved_plan_has_the_cut(tmp_path: Path) -> None:
    model = Tagger()
    plan = autopipe.plan(model, 3, 2, args=(tokens(),), cut_at=["layers.1", "head"])
    plan.save(tmp_path / "plan.json")
    pipe = compiled(model, plan=tmp_path / "plan.json")
    check(pipe, model, 5)
    assert stages_of_layers(pipe)["layers.2"] == {1}
    with pytest.raises(OptionError, match="positions to cut at beside a plan"):
        compiled(model, plan=plan, cut_at="blocks")


def test_a_search_under_a_memory_limit_keeps_to_it() -> None:
    model = Tagger()
    check(compiled(model, cut_at="blocks", memory="1MiB"), model, 5)


class EvaluatesLess(Tagger):
    """In evaluation it computes nothing behind its first stage."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) if self.training else self.embed(tokens).sin()


def test_a_call_that_leaves_stages_empty_has_a_plan(tmp_path: Path) -> None:
    pipe = compiled(EvaluatesLess(), cut_at="blocks", args=(tokens(),))
    assert torch.equal(pipe.eval()(tokens()), pipe.model(tokens()))
    assert [stage.calls for stage in pipe.plan.stages] == [2, 0, 0]
    assert "stages 1, 2 work less than 10%" in str(pipe.explain())
    pipe.plan.save(tmp_path / "plan.json")
    again = compiled(EvaluatesLess().eval(), plan=tmp_path / "plan.json")
    with pytest.raises(PlanError, match="found: none"):
        again(tokens())


def test_errors() -> None:
    with pytest.raises(OptionError, match=r"the nearest: 'layers\.2'"):
        compiled(Tagger(), cut_at=["layers.22"])
    with pytest.raises(PartitionError, match="1 positions to cut at"):
        compiled(Tagger(), cut_at=["layers.1"])(tokens())
