"""What is traced, and how often: gradients that are wanted, identical stages once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autopipe.passes.phases import cut as room
from autopipe.passes.phases.request import TraceCache
from tests.support.once import pure_passes_once
from tests.support.phased import SIZE, Layers, cut_model, phased_model
from tests.support.programs import phased_of, split_of


@pytest.fixture(scope="module", autouse=True)
def _once() -> Iterator[None]:
    """Tracing does not depend on the policy."""
    with pure_passes_once():
        yield


# ------------------------------------------------------------------------------- tracing once


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the stages that are traced from now on."""
    seen: list[int] = []
    trace = room.trace_joint

    def counting(stage: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(stage.index)
        return trace(stage, *args, **kwargs)

    monkeypatch.setattr(room, "trace_joint", counting)
    return seen


def test_identical_stages_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage sends no gradient; all that follow are alike."""
    seen = counted(monkeypatch)
    model, x = Layers(5), torch.randn(4, 6)
    cut = split_of(model, 5, x)
    traced = TraceCache()
    phased = phased_of(cut, model, SIZE, ((x,), {}), traced=traced)
    assert seen == [4, 0]
    assert len({id(s.graph) for s in phased.stages}) == 2
    assert [s.index for s in phased.stages] == list(range(5))
    for k, stage in enumerate(phased.stages):
        assert stage.state == (f"p_layers_{k}_weight", f"p_layers_{k}_bias")
        assert stage.own_grads == stage.state
        assert stage.sent_grads == (cut.stages[k].receives if k else ())
        assert stage.tangents == cut.stages[k].returns
    # again, at the same size: nothing is traced
    phased_of(cut, model, SIZE, ((x,), {}), traced=traced)
    assert seen == [4, 0]
    phased_of(cut, model, SIZE + 1, ((x,), {}), traced=traced)
    assert seen == [4, 0, 4, 0]


def test_a_frozen_stage_is_not_taken_for_one_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    model, x = Layers(4), torch.randn(4, 6).requires_grad_()
    model.layers[2].requires_grad_(False)
    phased = phased_of(split_of(model, 4, x), model, SIZE, ((x,), {}))
    assert seen == [3, 2]
    assert [bool(s.own_grads) for s in phased.stages] == [True, True, False, True]
    assert [len(s.sent_grads) for s in phased.stages] == [1, 1, 1, 1]


def test_draws_of_identical_stages_differ() -> None:
    """They share a graph, not what they draw: a key names the call in the captured graph."""

    class Noisy(Layers):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = F.dropout(torch.tanh(layer(x)), 0.5)
            return x

    model, x = Noisy(4), torch.randn(4, 6).requires_grad_()
    cut = split_of(model, 4, x)
    phased = phased_of(cut, model, SIZE, ((x,), {}))
    assert len({id(s.graph) for s in phased.stages}) == 1
    draws = [d for s in phased.stages for d in s.draws]
    assert len(draws) == len(set(draws)) == 4
    nodes = list(cut.captured.graph_module.graph.nodes)
    assert {str(nodes[call].target) for call, *_ in draws} == {"aten.dropout.default"}


# ------------------------------------------------------------------------------- what is wanted


def test_inference_has_a_forward_only() -> None:
    model, x = Layers(3), torch.randn(4, 6)
    phased = phased_of(split_of(model, 3, x), model, SIZE, ((x,), {}), grad=False)
    assert phased.differentiable == phased.differentiated == frozenset()
    for stage in phased.stages:
        assert set(stage.phase_of.values()) == {"F"}
        assert (stage.saved, stage.tangents, stage.own_grads, stage.sent_grads) == ((), (), (), ())


def test_only_wanted_gradients_are_computed() -> None:
    """A gradient of the first result alone needs nothing of the last stages."""

    class TwoHeads(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            first = torch.tanh(self.layers[0](x))
            return first, torch.tanh(self.layers[1](first.detach()))

    model, x = TwoHeads(2), torch.randn(4, 6)
    cut = split_of(model, 2, x)
    first, last = (o.name for o in cut.captured.outputs)
    both = phased_of(cut, model, SIZE, ((x,), {}))
    assert both.differentiable == both.differentiated == {first, last}
    one = phased_of(cut, model, SIZE, ((x,), {}), differentiated=[first])
    assert one.differentiated == {first}
    assert [len(s.own_grads) for s in both.stages] == [2, 2]
    assert [len(s.own_grads) for s in one.stages] == [2, 0]
    assert set(one.stages[1].phase_of.values()) == {"F"}


def test_integer_results_are_not_differentiable() -> None:
    class Both(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
            y = torch.tanh(self.layers[0](x))
            return y, y.argmax(-1), y.detach() * 2

    model, x = Both(1), torch.randn(4, 6)
    phased = phased_of(split_of(model, 2, x), model, SIZE, ((x,), {}))
    assert phased.differentiable == {phased.split.captured.outputs[0].name}


def test_shared_values_pass_their_gradients_on() -> None:
    """Each later holder adds its share to the sum and hands it to the holder before."""
    cut = cut_model("fan_out")
    (shared,) = [r.name for r in cut.routes.values() if len(r.consumers) == 2]
    stages = phased_model("fan_out", "none").stages
    assert [shared in s.tangents for s in stages] == [True, True, False]
    assert [shared in s.sent_grads for s in stages] == [False, True, True]
