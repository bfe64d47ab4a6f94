"""Every schedule gives GPipe's results, bit for bit, and keeps the memory that it promises."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import autopipe
from autopipe.errors import OptionError, StageError, UnsupportedError
from autopipe.passes import driver
from autopipe.passes.schedule import EXECUTED, Action, Scheduled, schedule
from autopipe.runtime.executor import Run
from tests.support.models import MODELS
from tests.support.once import pure_passes_once

EARLY = [kind for kind in EXECUTED if kind != "gpipe"]
"""The schedules whose backwards start before all forwards have ended."""


@pytest.fixture(scope="module", autouse=True)
def _once():
    with pure_passes_once():
        yield


class WithLoss(nn.Module):
    """A model that returns one loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result = self.model(*args, **kwargs)
        if isinstance(result, dict) and result.get("loss") is not None:
            own: Tensor = result["loss"]
            return own
        values = [
            x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad
        ]
        return torch.stack([x.square().mean() for x in values]).sum()


def step(model: nn.Module, inputs: Any, **options: Any) -> dict[str, Tensor | None]:
    """Loss, gradients and buffers after one training step of a copy of a model."""
    model = copy.deepcopy(model)
    pipe = autopipe.compile(model, **options)
    args, kwargs = inputs
    torch.manual_seed(3)
    loss = pipe(*args, **kwargs)
    loss.backward()
    found: dict[str, Tensor | None] = {"loss": loss.detach()}
    found |= {n: p.grad for n, p in model.named_parameters()}
    return found | {f"buffer {n}": b.clone() for n, b in model.named_buffers()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        if value is None or other is None:
            assert value is other, name
        else:
            assert torch.equal(other, value), name


@pytest.mark.few(6)
@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
@pytest.mark.parametrize("kind", EARLY)
@pytest.mark.parametrize("name", MODELS)
def test_results_are_gpipes_bit_for_bit(name: str, kind: str, remat: str) -> None:
    model, inputs = MODELS[name].make()
    for K, M, batch in ((1, 3, 7), (2, 4, 4), (3, 5, 9)):
        options = {"devices": K, "chunks": M, "remat": remat, "batch_norm": "micro"}
        expected = step(WithLoss(model), inputs(batch), schedule="gpipe", **options)
        assert_same(step(WithLoss(model), inputs(batch), schedule=kind, **options), expected)


class Layers(nn.Module):
    """Layers with dropout and a mean over the labels that count."""

    def __init__(self, count: int = 4, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(torch.tanh(layer(x)), 0.2, self.training)
        return F.cross_entropy(x, labels, ignore_index=-1)


def batch(samples: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(samples)
    labels = torch.randint(-1, 6, (samples,))
    labels[: samples // 3] = -1  # micro-batches with nothing to count
    return torch.randn(samples, 6), labels


def earlier(action: Action) -> list[Action]:
    """What runs before it, so that gradients add up in the order of micro-batches."""
    m, k = action.microbatch - 1, action.stage
    return [Action(letter, k, m) for letter in action.phase if letter in "FBW" and m >= 0]


def mixed(K: int, M: int, seed: int) -> Scheduled:
    """A random valid schedule: any device may run any action that it could run."""
    draw = random.Random(seed)
    rows: list[list[Action]] = [[] for _ in range(K)]
    cuts = {
        (k, m): draw.choice([("RBW",), ("RB", "W"), ("R", "BW"), ("R", "B", "W")])
        for k in range(K)
        for m in range(M)
    }
    todo: dict[tuple[int, str], list[Action]] = {}
    for k in range(K):
        todo[k, "F"] = [Action("F", k, m) for m in range(M)]
        for letter in "RBW":
            todo[k, letter] = [
                Action(phase, k, m) for m in range(M) for phase in cuts[k, m] if phase[0] == letter
            ]
    done: set[Action] = set()
    while any(todo.values()):
        ready = [
            queue
            for queue in todo.values()
            if queue and done.issuperset([*queue[0].needs(K), *earlier(queue[0])])
        ]
        action = draw.choice(ready).pop(0)
        rows[action.stage].append(action)
        done |= {Action(letter, action.stage, action.microbatch) for letter in action.phase}
    return Scheduled("mixed", K, M, tuple(map(tuple, rows)))


@pytest.mark.parametrize("seed", range(12))
def test_any_valid_order_gives_the_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    K, M = 1 + seed % 3, 1 + seed % 5
    options = {"devices": K, "chunks": M, "remat": ["full", "none", "min-cut"][seed % 3]}
    expected = step(Layers(), (batch(), {}), **options)
    planned = mixed(K, M, seed)
    planned.verify()
    monkeypatch.setattr(driver, "schedule", lambda *args, **kwargs: planned)
    assert_same(step(Layers(), (batch(), {}), schedule="1f1b", **options), expected)


@pytest.mark.parametrize("kind", EXECUTED)
def test_no_more_micro_batches_are_in_flight_than_planned(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min(K - k, M) at stage k with 1f1b and zb-h1 until B, M with gpipe (until W, one more)."""
    K, M = 3, 6
    now: dict[int, set[int]] = {k: set() for k in range(K)}
    most = [0] * K
    save, pop = Run.save, Run.pop_saved

    def saving(run: Run, stage: int, m: int, tensors: list[Tensor]) -> None:
        now[stage].add(m)
        most[stage] = max(most[stage], len(now[stage]))
        save(run, stage, m, tensors)

    def popping(run: Run, stage: int, m: int) -> list[Tensor]:
        now[stage].discard(m)
        return pop(run, stage, m)

    monkeypatch.setattr(Run, "save", saving)
    monkeypatch.setattr(Run, "pop_saved", popping)
    step(Layers(), (batch(12), {}), devices=K, chunks=M, schedule=kind)
    planned = schedule(kind, K, M).in_flight()
    assert all(0 < found <= limit for found, limit in zip(most, planned, strict=True))
    if kind in ("gpipe", "1f1b"):
        assert most == list(planned)
    if kind == "1f1b":
        assert most == [min(K - k, M) for k in range(K)]


@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
@pytest.mark.parametrize("kind", EXECUTED)
def test_the_plan_knows_the_bytes_that_are_saved_at_most(kind: str, remat: str) -> None:
    """Also those that are kept for delayed gradients of parameters."""
    model = Layers(8, 6)
    pipe = autopipe.compile(model, devices=4, chunks=16, schedule=kind, remat=remat)
    pipe(*batch(32)).backward()
    pipe.memory.reset()
    pipe(*batch(32)).backward()
    measured = [stage.peak for stage in pipe.memory.stages]
    assert measured == [stage.peak_saved_bytes for stage in pipe.plan.stages]
    if kind == "1f1b":
        whole = autopipe.compile(model, devices=4, chunks=16, remat=remat)
        whole(*batch(32)).backward()
        assert measured[0] <= whole.memory.stages[0].peak / 2


# ------------------------------------------------------------------------------- in a training loop


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
    assert compiled.loss_factor == 1024


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


def test_a_model_without_a_loss_is_refused() -> None:
    pipe = autopipe.compile(Scores(), devices=2, chunks=3, schedule="1f1b")
    with pytest.raises(UnsupportedError, match="returns no loss") as caught:
        pipe(batch()[0])
    assert "pipe.step" in str(caught.value.remedy)
    assert 'schedule="gpipe"' in str(caught.value.remedy)


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
