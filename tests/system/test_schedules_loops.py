"""Ordinary training loops under schedules that start backwards early; where the loss is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import CaptureError, OptionError, StageError, UnsupportedError
from tests.support.early_schedules import EARLY, Layers, batch, step


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def trained(kind: str, loop: Callable[[autopipe.Pipeline], None]) -> list[Tensor | None]:
    model = Layers()
    pipe = autopipe.compile(model, devices=2, chunks=3, schedule=kind)
    torch.manual_seed(3)
    loop(pipe)
    return gradients(model)


def accumulates(pipe: autopipe.Pipeline) -> None:
    for samples in (7, 5, 8):
        (pipe(*batch(samples)) / 3).backward()


def scales(pipe: autopipe.Pipeline) -> None:
    for scale in (65536.0, 65536.0, 32768.0):
        (pipe(*batch()) * scale).backward()


def adds_a_term(pipe: autopipe.Pipeline) -> None:
    loss = pipe(*batch())
    (loss + 0.1 * sum(p.square().sum() for p in pipe.parameters())).backward()


def keeps_two(pipe: autopipe.Pipeline) -> None:
    first, second = pipe(*batch(7)), pipe(*batch(5))
    (second + 2 * first).backward()


def skips_backwards(pipe: autopipe.Pipeline) -> None:
    pipe(*batch(7))
    pipe(*batch(5)).backward()


def uses_step(pipe: autopipe.Pipeline) -> None:
    pipe.step(*batch(7))


@pytest.mark.few(12)
@pytest.mark.parametrize("kind", EARLY)
@pytest.mark.parametrize(
    "loop", [accumulates, scales, adds_a_term, keeps_two, skips_backwards, uses_step]
)
def test_ordinary_loops_give_the_same_gradients(
    kind: str, loop: Callable[[autopipe.Pipeline], None]
) -> None:
    found, expected = trained(kind, loop), trained("gpipe", loop)
    scale = max(g.abs().max() for g in expected if g is not None)
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * scale.item())


def test_a_loss_scale_is_used_from_the_second_step_on() -> None:
    """So that gradients of half precision do not vanish."""
    model = Layers()
    pipe = autopipe.compile(model, devices=2, chunks=2, schedule="1f1b")
    for _ in range(2):
        (pipe(*batch()) * 1024).backward()
    (compiled, _) = pipe._programs.last
    assert compiled.loss_factor.value == 1024


class TwoLosses(Layers):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        loss = super().forward(x, labels)
        return {"loss": loss, "size": self.layers[0](x).square().mean(), "x": x}


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_another_loss_than_the_models_runs_the_step_again(weight: float) -> None:
    found = {}
    for kind in ("gpipe", "1f1b"):
        model = TwoLosses().eval().train()
        pipe = autopipe.compile(model, devices=2, chunks=3, schedule=kind)
        torch.manual_seed(3)
        result = pipe(*batch())
        if kind == "1f1b" and weight:
            with pytest.warns(UserWarning, match="the step runs again"):
                (result["loss"] + weight * result["size"]).backward()
        else:
            (result["loss"] + (weight * result["size"] if weight else 0)).backward()
        found[kind] = gradients(model)
    for a, b in zip(found["1f1b"], found["gpipe"], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_a_hook_of_a_parameter_is_called_once() -> None:
    model = Layers()
    calls: list[Tensor] = []
    model.layers[0].weight.register_hook(calls.append)
    autopipe.compile(model, devices=2, chunks=4, schedule="zb-h1")(*batch()).backward()
    assert len(calls) == 1


def test_a_second_backward_is_refused() -> None:
    pipe = autopipe.compile(Layers(), devices=2, chunks=2, schedule="1f1b")
    loss = pipe(*batch())
    loss.backward(retain_graph=True)
    with pytest.raises(StageError, match="second time"):
        loss.backward()


def test_gradients_that_are_differentiated_again() -> None:
    found = []
    for kind in ("gpipe", "zb-h1"):
        model = Layers().double()
        pipe = autopipe.compile(model, devices=2, chunks=2, schedule=kind)
        x, labels = batch()
        torch.manual_seed(3)
        wanted = list(model.parameters())
        grads = torch.autograd.grad(pipe(x.double(), labels), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_runs_all_forwards_first() -> None:
    model = Layers().eval()
    pipe = autopipe.compile(model, devices=2, chunks=2, schedule="1f1b")
    x, labels = batch()
    torch.testing.assert_close(pipe(x, labels), model(x, labels))
    assert "device_0_forward" in pipe.code
    with torch.no_grad():
        torch.testing.assert_close(pipe(x, labels), model(x, labels))


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", EARLY)
def test_a_failure_is_one_error_and_the_next_call_is_right(kind: str) -> None:
    model = Layers()
    pipe = autopipe.compile(model, devices=3, chunks=3, schedule=kind)
    x, labels = batch()
    pipe(x, labels).backward()
    wrong = labels.clone()
    wrong[-1] = 60
    with pytest.raises(StageError):
        pipe(x, wrong)
    model.zero_grad()
    torch.manual_seed(3)
    pipe(x, labels).backward()
    found = gradients(model)
    options = {"devices": 3, "chunks": 3}
    expected = step(Layers(), ((x, labels), {}), **options)
    for a, b in zip(found, [expected[n] for n, _ in model.named_parameters()], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------- the loss outside


class Scores(Layers):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def weighted(scores: Tensor, labels: Tensor) -> Tensor:
    weights = torch.linspace(1, 2, 6, dtype=scores.dtype)
    return F.cross_entropy(scores, labels, weights, ignore_index=-1, label_smoothing=0.1)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", EARLY)
def test_step_captures_the_loss_function(kind: str) -> None:
    model, x, labels = Scores(), *batch()
    pipe = autopipe.compile(model, devices=2, chunks=3, schedule=kind, loss_fn=weighted)
    loss = pipe.step(x, target=labels)
    found = gradients(model)
    model.zero_grad()
    expected = weighted(model(x), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for a, b in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(a, b)
    assert pipe.verify(x).ok
    torch.testing.assert_close(pipe.eval()(x), model(x))


class Dropping(Layers):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = F.dropout(torch.tanh(layer(x)), 0.3, self.training)
        return x


def test_a_captured_loss_leaves_random_numbers_as_they_are() -> None:
    """The target is one more input of the graph, which no key of a draw counts."""
    found = {}
    for kind in ("gpipe", "1f1b", "zb-v"):
        model, (x, labels) = Dropping(8), batch()
        pipe = autopipe.compile(model, devices=2, chunks=3, schedule=kind, loss_fn=weighted)
        torch.manual_seed(5)
        found[kind] = pipe.step(x, target=labels)
    assert len({float(loss) for loss in found.values()}) == 1


def test_a_model_without_a_loss_is_refused() -> None:
    pipe = autopipe.compile(Scores(), devices=2, chunks=3, schedule="1f1b")
    with pytest.raises(UnsupportedError, match="returns no loss") as caught:
        pipe(batch()[0])
    assert "pipe.step" in str(caught.value.remedy)
    assert 'schedule="gpipe"' in str(caught.value.remedy)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", EARLY)
def test_step_without_its_target(kind: str) -> None:
    x, labels = batch()
    pipe = autopipe.compile(Scores(), devices=2, chunks=3, schedule=kind, loss_fn=weighted)
    with pytest.raises(OptionError, match="without a target") as caught:
        pipe.step(x)
    assert type(caught.value.__cause__) is TypeError
    assert "target=y" in str(caught.value.remedy)
    loss = pipe.step(x, target=labels)
    torch.testing.assert_close(loss, weighted(pipe.model(x), labels).detach())
    plain = autopipe.compile(
        Scores(), devices=2, chunks=3, schedule=kind, loss_fn=lambda y, _: y.square().mean()
    )
    assert plain.step(x).isfinite()


@pytest.mark.parametrize("given", ["schedule", "plan", "remat"])
def test_verify_of_a_model_without_a_loss(given: str) -> None:
    """With the stages that it has, all forwards first."""
    x = batch()[0]
    options: dict[str, Any] = {"devices": 2, "chunks": 3, "schedule": "zb-v"}
    if given == "remat":
        options["remat"] = ["full", "none", "min-cut", "full"]
    if given == "plan":
        plan = autopipe.plan(Scores(), args=(x,), **options)
        options = {"plan": plan}
    found = autopipe.compile(Scores(), loss_fn=weighted, **options).verify(x)
    assert found.ok
    assert any("all forwards first" in note for note in found.notes)
    scored = autopipe.compile(Layers().eval().train(), devices=2, chunks=1, schedule="1f1b")
    assert not any("no loss" in note for note in scored.verify(*batch()).notes)


def test_a_loss_function_that_returns_no_number_is_refused() -> None:
    pipe = autopipe.compile(
        Scores(), devices=2, chunks=3, schedule="1f1b", loss_fn=lambda y, t: (y - t).square()
    )
    with pytest.raises((OptionError, UnsupportedError), match="loss"):
        pipe.step(batch()[0], target=torch.zeros(7, 6))


class Balanced(Layers):
    """A loss whose factors depend on what all micro-batches compute, in two ways."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = torch.tanh(self.layers[0](x))
        first, second = x.square().sum(), torch.tanh(self.layers[1](x)).sum()
        return first * second


class Root(Layers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(self.layers[1](torch.tanh(self.layers[0](x)))).square().sum().sqrt()


def test_factors_that_are_not_known_in_time() -> None:
    pipe = autopipe.compile(Balanced(), devices=2, chunks=3, schedule="1f1b")
    with pytest.raises(UnsupportedError, match="what all micro-batches compute") as caught:
        pipe(*batch())
    assert caught.value.node is not None
    found, expected = (
        step(Root(), (batch(), {}), devices=2, chunks=3, schedule=kind)
        for kind in ("1f1b", "gpipe")
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# ------------------------------------------------------------------------------- state of a loss


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return (y - target).square().mean() * self.calls


class Learning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        return ((y - target).square() * self.weight).mean()


class Annealed:
    """A weight that the loop changes, in an attribute."""

    def __init__(self) -> None:
        self.weights = [1.0]

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().mean() * self.weights[0]


class AnnealedBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.ones(1))

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().mean() * self.weights[0]


def scaled(y: Tensor, target: Tensor, weights: list[float]) -> Tensor:
    return (y - target).square().mean() * weights[0]


@pytest.mark.parametrize("kind", [Counting, Learning])
def test_state_that_a_captured_loss_would_lose_is_refused(kind: type[nn.Module]) -> None:
    pipe = autopipe.compile(Scores(), devices=2, chunks=3, schedule="1f1b", loss_fn=kind())
    with pytest.raises(CaptureError):
        pipe.step(batch()[0], target=torch.zeros(7, 6))


@pytest.mark.parametrize("how", ["attribute", "buffer", "method", "partial"])
def test_a_weight_of_the_loss_that_changes_is_seen(how: str) -> None:
    owner: Any = AnnealedBuffer() if how == "buffer" else Annealed()
    loss_fn: Callable[..., Tensor] = owner
    if how == "method":
        loss_fn = owner.__call__
    elif how == "partial":
        loss_fn = functools.partial(scaled, weights=owner.weights)
    model, x, target = Scores(), batch()[0], torch.zeros(7, 6)
    pipe = autopipe.compile(model, devices=2, chunks=3, schedule="1f1b", loss_fn=loss_fn)
    for _ in range(3):
        torch.testing.assert_close(pipe.step(x, target=target), loss_fn(model(x), target).detach())
        owner.weights[0] *= 2
