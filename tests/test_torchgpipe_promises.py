"""What torchgpipe 0.0.7 promises its users, for models of any shape: the wrapper is transparent.

Truth is the model itself in eager torch, in float64, on the whole batch. What it promises about
BatchNorm, about leaks and about failures stands in the files beside this one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import CaptureError, InputError, UnsupportedError

from .agreement import assert_agrees, assert_close, pipelined

REMATS = ("none", "full", "min-cut")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def linears(count: int = 5) -> nn.Sequential:
    """Linear maps and nothing in between: every cut is as good as another."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(count))).double()


class Pair(nn.Module):
    """Two tensors in, two out, the second of which did nothing for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = pair
        return torch.tanh(self.first(x)), self.second(y)


class Meet(nn.Module):
    """Two tensors in, one out."""

    def __init__(self) -> None:
        super().__init__()
        self.of_both = nn.Bilinear(6, 6, 6)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.of_both(*pair)


class Part(nn.Module):
    """One tensor in; three out: a value, what is not a tensor, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, int, None]:
        return torch.tanh(self.layer(x)), 7, None


def twice() -> nn.Sequential:
    """One layer that stands in two places."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), layer, nn.Tanh())


def nested() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))),
        nn.ModuleDict({"only": nn.Sequential(nn.GELU(), nn.Linear(8, 4))})["only"],
        nn.Sequential(nn.Tanh(), nn.Linear(4, 3)),
    )


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.Flatten()
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "linears": (linears, lambda n: random(n, 6)),
    "nested": (nested, lambda n: random(n, 6)),
    "a layer in two places": (twice, lambda n: random(n, 6)),
    "convolutions": (convolutions, lambda n: random(n, 2, 8, 8)),
    "pairs": (
        lambda: nn.Sequential(Pair(), Pair(), Pair()),
        lambda n: (random(n, 6), random(n, 6) * 2),
    ),
    "pairs that meet": (
        lambda: nn.Sequential(Pair(), Meet(), nn.Tanh(), nn.Linear(6, 2)),
        lambda n: (random(n, 6), random(n, 6) * 2),
    ),
    "values that are no tensors": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), Part()),
        lambda n: random(n, 6),
    ),
    "whole numbers in": (
        lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)),
        lambda n: torch.arange(n * 3).view(n, 3) % 9,
    ),
}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name][0]().double()


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NETS)
def test_a_net_is_itself_on_any_number_of_devices(name: str, devices: int, chunks: int) -> None:
    assert_agrees(pipelined(net(name), devices=devices, chunks=chunks), NETS[name][1](4))


@pytest.mark.parametrize("remat", ["none", "min-cut"])
@pytest.mark.parametrize("name", NETS)
def test_a_net_is_itself_with_any_rematerialization(name: str, remat: str) -> None:
    assert_agrees(pipelined(net(name), devices=3, remat=remat), NETS[name][1](7))


@pytest.mark.parametrize("order", ["aab", "aba", "aaba", "abab", "abba", "abbb"])
def test_layers_that_come_back(order: str) -> None:
    """A stage for each; which of them lends its parameters to whom differs."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(6, 6) for name in "ab"}
    model = nn.Sequential(*(m for name in order for m in (layers[name], nn.Tanh())))
    pipe = pipelined(model.double(), devices=len(order))
    assert_agrees(pipe, random(5, 6))


def test_inputs_get_their_gradients_in_a_tuple_too() -> None:
    x, y = random(5, 6).requires_grad_(), random(5, 6).requires_grad_()
    assert_agrees(pipelined(net("pairs")), (x, y))
    assert_agrees(pipelined(net("pairs that meet")), (x, y.detach()))


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("wants", [True, False])
def test_a_first_stage_without_parameters(remat: str, wants: bool) -> None:
    """Nothing there wants a gradient but perhaps the input."""
    torch.manual_seed(0)
    stem = [m for _ in range(6) for m in (nn.Hardtanh(), nn.Softsign())]
    model = nn.Sequential(*stem, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = random(5, 6).requires_grad_(wants)
    pipe = pipelined(model, remat=remat, args=(x,))
    assert pipe.stages[0].parameters == ()
    assert_agrees(pipe, x)


def test_a_model_without_layers_gives_back_its_input() -> None:
    x = random(4, 6)
    assert autopipe.compile(nn.Sequential(), 1, 2)(x) is x


# ------------------------------------------------------------------------------- any batch


@pytest.mark.parametrize("chunks", [2, 3, 4, 7])
def test_batches_that_do_not_divide_or_are_smaller_than_chunks(chunks: int) -> None:
    """One pipeline, its batches growing and shrinking; gradients too."""
    pipe = pipelined(net("nested"), chunks=chunks)
    for batch in (7, 1, 5, 2, 8, 3):
        assert_agrees(pipe, random(batch, 6).requires_grad_())
        assert len(pipe.plan.sizes) == min(batch, chunks)


@pytest.mark.parametrize("name", ["convolutions", "pairs that meet"])
def test_a_batch_of_one_as_the_first_one(name: str) -> None:
    pipe = pipelined(net(name), chunks=4)
    for batch in (1, 6, 1):
        assert_agrees(pipe, NETS[name][1](batch))


def test_a_loss_over_a_batch_that_does_not_divide() -> None:
    """The mean over 7 is not the mean of the means over 3, 2 and 2."""
    model, x, target = net("nested"), random(7, 6), random(7, 3)
    twin, pipe = copy.deepcopy(model), pipelined(model)
    for module in (pipe, twin):
        F.mse_loss(module(x), target).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad)


@pytest.mark.parametrize("grad", [True, False])
def test_an_empty_batch_is_refused_with_a_reason(grad: bool) -> None:
    pipe, x = pipelined(net("linears")), random(6, 6)
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # first as the first batch of all, then as a later one
            with pytest.raises(InputError, match="without samples"):
                pipe(x[:0])
            pipe(x)
    assert_agrees(pipe, x)


# ------------------------------------------------------------------------------- modes


def test_without_gradients_nothing_is_kept_and_none_can_flow() -> None:
    pipe, x = pipelined(net("nested")), random(5, 6)
    with torch.no_grad():
        found = pipe(x.requires_grad_())
    assert not found.requires_grad
    assert [s.peak for s in pipe.memory.stages] == [0, 0]
    assert_close(found, pipe.model(x).detach())


def test_gradients_may_be_switched_on_and_off_between_calls() -> None:
    pipe, x = pipelined(net("nested")), random(5, 6)
    for _ in range(2):
        assert_agrees(pipe, x)
        with torch.no_grad():
            assert not pipe(x).requires_grad
            with torch.enable_grad():
                assert pipe(x).requires_grad


def test_gradients_flow_in_evaluation_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Tanh()
    )
    pipe = pipelined(model.double().eval())
    assert_agrees(pipe, random(7, 6).requires_grad_())


def test_a_frozen_model_passes_gradients_on_to_its_input() -> None:
    model = net("nested").requires_grad_(False)
    pipe = pipelined(model)
    assert not pipe(random(5, 6)).requires_grad
    assert_agrees(pipe, random(5, 6).requires_grad_())
    assert all(p.grad is None for p in model.parameters())


def test_a_result_can_be_detached() -> None:
    """What is computed from it without gradients needs no backward, nor does the pipeline."""
    pipe, x = pipelined(net("linears")), random(5, 6)
    found = pipe(x).detach()
    assert not found.requires_grad
    assert_close(found, pipe.model(x).detach())
    assert all(s.now == 0 for s in pipe.memory.stages)


# ------------------------------------------------------------------------------- random numbers


class Drops(nn.Module):
    """A product of dropouts and numbers: the gradient of x = 1 is what became of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.rand(64) + 0.5 for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = F.dropout(x, 0.3, self.training) * scale
        return x


def drops() -> Drops:
    torch.manual_seed(0)
    return Drops().double()


@pytest.mark.parametrize(("devices", "remat"), [(1, "full"), (2, "none"), (4, "min-cut")])
def test_what_is_dropped_forward_is_dropped_backward(devices: int, remat: str) -> None:
    x = torch.ones(7, 64, dtype=torch.float64, requires_grad=True)
    found = pipelined(drops(), devices=devices, remat=remat)(x)
    kept = found != 0
    assert 0.1 < kept.double().mean() < 0.4  # 0.7 to the fourth is 0.24
    found.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, kept)
    assert_close(x.grad, found.detach())


@pytest.mark.parametrize("remat", REMATS)
def test_a_backward_leaves_the_generator_alone(remat: str) -> None:
    pipe = pipelined(drops(), remat=remat)
    loss = pipe(torch.ones(5, 64, dtype=torch.float64)).sum()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_repeats_a_run_and_calls_differ() -> None:
    pipe, x = pipelined(drops()), torch.ones(5, 64, dtype=torch.float64)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append([pipe(x), pipe(x), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])


def test_a_step_moves_the_generator_by_the_same_on_any_plan() -> None:
    """So what the training loop draws after it does not depend on the number of devices."""
    x, states = torch.ones(6, 64, dtype=torch.float64), []
    for devices, chunks, remat in ((1, 1, "none"), (2, 3, "full"), (4, 6, "min-cut")):
        pipe = pipelined(drops(), devices=devices, chunks=chunks, remat=remat)
        torch.manual_seed(11)
        for _ in range(2):
            pipe(x).sum().backward()
        states.append(torch.get_rng_state())
    assert all(torch.equal(s, states[0]) for s in states)


@pytest.mark.parametrize("name", ["no random call", "dropout in evaluation"])
def test_a_step_without_randomness_leaves_the_generator_alone(name: str) -> None:
    model = net("nested") if name == "no random call" else drops().eval()
    x = random(5, 6) if name == "no random call" else random(5, 64)
    pipe = pipelined(model, args=(x,))
    before = torch.get_rng_state()
    pipe(x)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------- in place


class Written(nn.Module):
    """Layers, and something in place after each."""

    def __init__(self, change: Callable[[Tensor], Any], count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))
        self.change = change
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            self.change(x)
        return x


def of_a_view(x: Tensor) -> None:
    x[:, 1:3].mul_(2).tanh_()


def of_the_base_of_a_view(x: Tensor) -> None:
    view = x.view(-1, 2, 3)
    x.mul_(2)
    view[:, 0].add_(x[:, :3].sum(1, keepdim=True).detach())


def by_index(x: Tensor) -> None:
    x[:, 0] = 0.5
    x[:, 4] = x[:, 3]


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "relu": nn.ReLU(inplace=True),
    "a view": of_a_view,
    "the base of a view": of_the_base_of_a_view,
    "entries": by_index,
}


@pytest.mark.parametrize(("devices", "remat"), [(1, "none"), (2, "full"), (4, "min-cut")])
@pytest.mark.parametrize("name", IN_PLACE)
def test_changing_a_layers_value_in_place(name: str, devices: int, remat: str) -> None:
    """Wherever the cuts fall, nobody sees another stage's memory change."""
    pipe = pipelined(Written(IN_PLACE[name]), devices=devices, remat=remat)
    assert_agrees(pipe, random(5, 6).requires_grad_())


def test_a_result_that_a_stage_has_sent_is_not_changed_by_another() -> None:
    """ReLU in place right behind a cut, of a value that is also a result."""

    class Sent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.tanh(self.first(x))
            return self.last(F.relu(x.clone(), inplace=True)), x

    torch.manual_seed(0)
    assert_agrees(pipelined(Sent().double()), random(5, 6))


@pytest.mark.parametrize("remat", REMATS)
def test_what_autograd_still_needs_cannot_be_changed_in_place(remat: str) -> None:
    """The derivative of exp is its result: eager refuses, and so does the pipeline."""

    def change(x: Tensor) -> None:
        x.exp_().add_(1)

    x = random(5, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Written(change)(x).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pipelined(Written(change), remat=remat)(x).sum().backward()


class Input(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(F.relu(x, inplace=True)))


def test_an_input_that_wants_a_gradient_cannot_be_changed_in_place() -> None:
    x = random(5, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        Input().double()(x)
    before = x.detach().clone()
    with pytest.raises(CaptureError, match="leaf Variable that requires grad"):
        pipelined(Input().double())(x)
    assert torch.equal(x, before)


def test_an_input_changed_in_place_is_refused_before_it_is_touched() -> None:
    """Eager would change the caller's tensor; micro-batches of it do not promise to."""
    x = random(5, 6)
    before = x.clone()
    with pytest.raises(UnsupportedError, match="in place") as caught:
        pipelined(Input().double())(x)
    assert "clone" in str(caught.value.remedy)
    assert torch.equal(x, before)
