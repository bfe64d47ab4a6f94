"""`pipe.verify`: says that a right pipeline is right, and where a wrong one goes wrong."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autopipe
from autopipe.errors import UnsupportedError
from autopipe.runtime.executor import Run
from tests.support.agreement import pipelined
from tests.support.models import MODELS
from tests.support.programs import user_line

pytestmark = pytest.mark.few(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Classifier(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(drop)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        x = self.drop(self.norm(torch.tanh(self.first(x))))
        logits = self.last(x)
        return {"loss": F.cross_entropy(logits, target), "logits": logits}


def batch(size: int = 7) -> tuple[Tensor, Tensor]:
    target = torch.randint(0, 3, (size,))
    target[:2] = -100
    return torch.randn(size, 6), target


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "resnet", "unet"])
def test_real_models_are_verified(name: str) -> None:
    model, inputs = MODELS[name].make()
    args, kwargs = inputs(7)
    found = autopipe.compile(model, devices=2, chunks=3).verify(*args, **kwargs)
    assert found.ok, str(found)
    assert len(found.differences) > 5
    assert found.node is None


def test_random_calls_and_batch_norm_are_made_comparable() -> None:
    pipe = pipelined(Classifier(drop=0.5))
    found = pipe.verify(*batch())
    assert found.ok, str(found)
    assert {d.kind for d in found.differences} == {"output", "gradient", "buffer"}
    assert len(found.notes) == 2
    text = str(found)
    assert "output  2 of 2" in text
    assert "randomness was disabled in both runs" in text
    x, target = batch()
    torch.manual_seed(1)
    first = pipe(x, target)["logits"]
    torch.manual_seed(2)
    assert not torch.equal(first, pipe(x, target)["logits"])  # the pipeline itself still drops


def test_a_model_with_reentrant_checkpoints() -> None:
    """torch refuses to give such a model's gradients apart from ``.grad``."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.first, x, use_reentrant=True)).sin().mean()

    found = pipelined(Checkpointed()).verify(torch.randn(7, 6, requires_grad=True))
    assert found.ok, str(found)
    assert found.worst("gradient") is not None


class Draws(nn.Module):
    def __init__(self, f: Any) -> None:
        super().__init__()
        self.layer, self.f = nn.Linear(6, 6), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.layer(x)) * 1.5


STILLED: dict[str, Any] = {
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 12, 0.3, batch_first=True),
    "gumbel": lambda: Draws(F.gumbel_softmax),
    "slopes": lambda: nn.Sequential(nn.Linear(6, 6), nn.RReLU(), nn.Linear(6, 6)),
    "dropouts": lambda: Draws(lambda y: F.alpha_dropout(F.dropout(y, 0.3), 0.3, training=True)),
}


@pytest.mark.full
@pytest.mark.parametrize("name", STILLED)
def test_functions_that_draw_inside_are_made_deterministic(name: str) -> None:
    found = pipelined(STILLED[name]()).verify(torch.randn(7, 5, 6))
    assert found.ok, str(found)
    assert "randomness was disabled in both runs" in str(found)


def test_what_stays_random_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot disable") as caught:
        pipelined(Draws(lambda y: y * torch.poisson(y.abs()))).verify(torch.randn(7, 6))
    assert str(caught.value.source).startswith(__file__)


def test_nothing_is_left_behind() -> None:
    model = Classifier(drop=0.5)
    pipe = pipelined(model)
    x, target = batch()
    x.requires_grad_()
    pipe(x, target)["loss"].backward()
    before = {n: b.clone() for n, b in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    of_input = x.grad.clone()
    state = torch.get_rng_state()
    pipe.verify(x, target)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], b) for n, b in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(x.grad, of_input)


def test_without_gradients_only_results_are_compared() -> None:
    pipe = pipelined(Classifier().eval())
    with torch.no_grad():
        found = pipe.verify(*batch())
    assert found.ok
    assert {d.kind for d in found.differences} == {"output", "buffer"}


class Drifts(nn.Module):
    """Holds state that no graph shows: its second layer scales by another number every time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Layer(), Layer(drift=0.5), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x))).sum()


class Layer(nn.Module):
    def __init__(self, drift: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.drift, self.calls = drift, io.BytesIO()  # what is not written in Python is not seen

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        self.calls.write(b"x")
        return y * (1.0 + self.drift * self.calls.tell())  # the line that drifts


def test_it_names_where_the_captured_graph_is_another_than_the_model() -> None:
    pipe = pipelined(Drifts())
    x = torch.randn(7, 6)
    pipe(x)
    pipe.model(x)
    found = pipe.verify(x)
    assert not found.ok
    assert found.source == user_line(Layer.forward, "# the line " + "that drifts")
    node = next(n for n in pipe.captured.graph_module.graph.nodes if n.name == found.node)
    assert "second" in node.meta["modules"][-1]
    assert found.stage is not None
    stage = pipe.stages[found.stage].graph_module.graph
    assert found.node in {n.name for n in stage.nodes}
    assert f"first difference: stage {found.stage}, node {found.node}" in str(found)


def test_it_names_the_first_value_that_a_stage_makes_wrongly(monkeypatch: Any) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    pipe = pipelined(model, devices=3)
    x = torch.randn(7, 6)
    pipe(x)
    (wrong,) = [b.name for b in pipe.stages[1].outputs]
    receive = Run.receive

    def disturbed(run: Run, what: str, stage: int, m: int) -> Tensor:
        tensor = receive(run, what, stage, m)
        return tensor + 0.1 if (stage, m) == (1, 1) else tensor

    monkeypatch.setattr(Run, "receive", disturbed)
    found = pipe.verify(x)
    assert not found.ok
    assert (found.stage, found.node) == (1, wrong)


def test_it_names_the_stage_of_a_wrong_gradient(monkeypatch: Any) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    pipe = pipelined(model, devices=3)
    x = torch.randn(7, 6)
    pipe(x)
    accumulate = Run.accumulate

    def doubling(run: Run, name: str, stage: int, gradient: Tensor) -> None:
        accumulate(run, name, stage, gradient * 2 if name == "p_3_weight" else gradient)

    monkeypatch.setattr(Run, "accumulate", doubling)
    found = pipe.verify(x)
    assert [d.name for d in found.differences if not d.ok] == ["3.weight"]
    assert "3.weight" in pipe.stages[found.stage].parameters
    assert "gradient  11 of 12" in str(found)


def test_the_tolerance_can_be_stated() -> None:
    pipe = pipelined(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    x = torch.randn(7, 6)
    assert pipe.verify(x).ok
    assert not pipe.verify(x, tolerance=0.0).ok or all(
        d.largest == 0 for d in pipe.verify(x).differences
    )


def test_an_installed_pipeline_is_compared_with_the_model_itself(monkeypatch: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    pipe = pipelined(model)
    x = torch.randn(7, 6)
    pipe.install()
    assert pipe.verify(x).ok
    assert model._compiled_call_impl is not None
    accumulate = Run.accumulate
    monkeypatch.setattr(Run, "accumulate", lambda r, n, k, g: accumulate(r, n, k, 2 * g))
    assert not pipe.verify(x).ok
