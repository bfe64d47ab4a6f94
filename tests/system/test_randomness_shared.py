"""Promise 3, for numbers that all samples share: one draw per step, as in the whole batch.

A mixing factor, the depth of this batch, the mask of a weight. Truth is the model itself in eager
torch, told what was drawn (each model returns it): its arithmetic on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.passes.graph.fingerprints import fingerprint
from autopipe.runtime.random import derive_seed, step_seed
from tests.support.programs import calls, sole_stage

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]

REMATS = ("none", "full", "min-cut")
PLANS = [
    (1, 1, "full"),
    (1, 3, "none"),
    (2, 2, "full"),
    (2, 3, "min-cut"),
    (3, 2, "min-cut"),
    (3, 3, "full"),
]

Draw = Callable[["Shared"], Tensor]


class Shared(nn.Module):
    """Some layers whose values are scaled by what was drawn, in every stage; returns that, too."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.free = nn.Parameter(torch.rand(2, 3, 6) + 0.5)
        self.draw = draw
        self.double()

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        drawn = self.draw(self) if given is None else given
        for layer in self.layers:
            x = torch.tanh(layer(x)) * drawn.sum() + drawn.mean()
        return x, drawn


class Noise(torch.autograd.Function):
    """A Function of one's own that draws."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.rand_like(x) + 0 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0 * gradient


DRAWS: dict[str, Draw] = {
    "a mixing factor": lambda s: torch.rand(()),
    "a factor of the Beta distribution": lambda s: torch.distributions.Beta(
        torch.tensor(0.4), torch.tensor(0.4), validate_args=False
    ).sample(),
    "the depth of this batch": lambda s: torch.empty(1).bernoulli_(0.5) + 0.1,
    "numbers in place": lambda s: torch.zeros(4, dtype=torch.float64).uniform_(0.1, 1.0),
    "numbers like a weight": lambda s: torch.randn_like(s.free),
    "an integer": lambda s: torch.randint(1, 9999, ()).double() / 9999,
    "an order": lambda s: torch.randperm(40).double()[:3] / 40,
    "choices": lambda s: torch.multinomial(torch.ones(999), 3).double() / 999,
    "of a Function": lambda s: Noise.apply(s.free.detach()),
    "by two operators": lambda s: torch.rand(3) + torch.normal(torch.zeros(3), 1.0),
}
DROPPED: dict[str, Draw] = {  # their values have gradients
    "a dropped weight": lambda s: F.dropout(s.free, 0.5),
    "a weight dropped twice": lambda s: F.dropout(F.dropout(s.free, 0.2) * 2, 0.2),
    "the first of two results": lambda s: torch.native_dropout(s.free, 0.5, True)[0],
    "channels of a weight": lambda s: F.dropout1d(s.free, 0.5),
    "attention": lambda s: F.scaled_dot_product_attention(s.free, s.free, s.free, dropout_p=0.5),
}


def step(pipe: nn.Module, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Result, what was drawn, and the gradients that the result (alone) gives."""
    pipe.zero_grad()
    x = x.clone().requires_grad_()
    out, drawn = pipe(x, *given)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    gradients = [g for g in (x.grad, *(p.grad for p in pipe.parameters())) if g is not None]
    return out.detach(), drawn.detach(), gradients


def batch(size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", DRAWS)
def test_a_number_that_all_samples_share_is_drawn_once(name: str) -> None:
    """Whatever the stages, micro-batches and rematerialization: the same, and eager's gradients."""
    model = Shared(DRAWS[name])
    seen = []
    for devices, chunks, remat in PLANS:
        pipe = autopipe.compile(model, devices, chunks, remat=remat)
        torch.manual_seed(7)
        out, drawn, gradients = step(pipe, batch())
        expected, _, exact = step(model, batch(), drawn)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients, exact, rtol=1e-11, atol=1e-11)
        assert not torch.equal(step(pipe, batch())[1], drawn), "a further call draws anew"
        seen.append(drawn)
    assert all(torch.equal(drawn, seen[0]) for drawn in seen)


class Dropped(nn.Module):
    """DropConnect: the mask is on a weight. Its gradient is zero where the mask is."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.free = nn.Parameter(torch.rand(4, 8, 6) + 0.5)
        self.last = nn.Linear(8, 3)
        self.draw = draw
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.draw(self)
        return self.last(torch.tanh(self.first(x) @ weight.sum(0).T)), weight


@pytest.mark.parametrize("name", DROPPED)
def test_a_weight_is_dropped_once(name: str) -> None:
    model = Dropped(DROPPED[name])
    seen = []
    for devices, chunks, remat in PLANS:
        pipe = autopipe.compile(model, devices, chunks, remat=remat)
        torch.manual_seed(7)
        out, weight, gradients = step(pipe, batch())
        given = weight.requires_grad_()
        hidden = torch.tanh(model.first(batch()) @ given.sum(0).T)
        torch.testing.assert_close(out, model.last(hidden), rtol=1e-12, atol=1e-12)
        seen.append([weight.detach(), *gradients])
        assert not torch.equal(step(pipe, batch())[1], weight), "a further call draws anew"
    for values in seen[1:]:
        torch.testing.assert_close(values, seen[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_the_gradient_of_a_dropped_weight_has_its_zeros(devices: int, remat: str) -> None:
    """Micro-batches with masks of their own would leave an eighth of the zeros."""
    model = Dropped(DROPPED["a dropped weight"])
    pipe = autopipe.compile(model, devices, 3, remat=remat)
    for _ in range(2):
        out, weight, _ = step(pipe, batch())
        assert model.free.grad is not None
        assert torch.equal(model.free.grad == 0, weight == 0)
        assert abs((weight == 0).double().mean() - 0.5) < 0.2
        given = weight.requires_grad_()
        expected = model.last(torch.tanh(model.first(batch()) @ given.sum(0).T))
        tangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        (exact,) = torch.autograd.grad(expected, [given], tangent)
        exact = exact * torch.where(weight == 0, 0.0, 2.0)
        torch.testing.assert_close(model.free.grad, exact, rtol=1e-11, atol=1e-13)


def test_what_is_returned_alone_has_its_gradient() -> None:
    """Of a dropped weight that is itself the result."""
    model = Dropped(DROPPED["a dropped weight"])
    for chunks in (1, 3):
        pipe = autopipe.compile(model, 2, chunks)
        model.zero_grad()
        torch.manual_seed(7)
        out, weight = pipe(batch())
        (weight.sum() + 0 * out.sum()).backward()
        assert model.free.grad is not None
        expected = torch.where(weight == 0, 0.0, 2.0).double()
        torch.testing.assert_close(model.free.grad, expected, rtol=1e-12, atol=1e-12)
        assert 0 < (weight == 0).sum() < weight.numel()


# ------------------------------------------------------------------------------- which draws


class Both(nn.Module):
    """Two draws of every sample's own, and one for all of them between."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.rand_like(x)
        return own, x + torch.rand(6), F.dropout(x, 0.5)


@pytest.mark.parametrize("devices", [1, 3])
def test_keys(devices: int) -> None:
    """(seed, call, which draw, micro-batch); of what is shared, the first micro-batch's."""
    pipe = autopipe.compile(Both(), devices, 3)
    x = torch.ones(6, 6)
    torch.manual_seed(5)
    own, shared, dropped = pipe(x)
    torch.manual_seed(5)
    seed = step_seed()
    calls = [n for n in pipe.captured.graph_module.graph.nodes if n.op == "call_function"]
    positions = {str(n.target): i for i, n in enumerate(calls)}

    def generator(name: str, m: int) -> torch.Generator:
        call = positions[f"aten.{name}.default"]
        return torch.Generator().manual_seed(derive_seed(seed, call, 0, m))

    for m, part in enumerate(own.chunk(3)):
        assert torch.equal(part, torch.rand(2, 6, generator=generator("rand_like", m)))
    expected = torch.rand(6, generator=generator("rand", 0)) + 1
    assert torch.equal(shared, expected.expand(6, 6))
    for m, part in enumerate(dropped.chunk(3)):
        with torch.random.fork_rng():
            torch.set_rng_state(generator("dropout", m).get_state())
            assert torch.equal(part, F.dropout(torch.ones(2, 6), 0.5))


OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "of a constant for each sample": lambda x: torch.full((x.shape[0], 6), 0.5).bernoulli(),
    "dropout of ones": lambda x: F.dropout(torch.ones(x.shape[0], 6), 0.5),
    "rand": lambda x: torch.rand(x.shape[0], 6),
    "of what is expanded": lambda x: F.dropout(torch.ones(1, 6).expand(x.shape[0], 6), 0.5),
}


@pytest.mark.parametrize("name", OWN)
def test_samples_keep_numbers_of_their_own(name: str) -> None:
    """Beside a number that they share: micro-batches do not repeat one another."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return OWN[name](x), x * torch.rand(())

    own, shared = autopipe.compile(Model(), 2, 3)(torch.ones(30, 6))
    assert (shared == shared[0, 0]).all()
    parts = own.chunk(3)
    assert not torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[1], parts[2])


def test_a_loss_and_its_factor() -> None:
    """What follows the reduction is worked out once: with the number that the samples had."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
            t = torch.rand(()) if given is None else given
            return (self.layer(x) * t).pow(2).mean() * (1 - t), t

    model, x = Loss().double(), batch(7)
    pipe = autopipe.compile(model, 2, 3)
    out, drawn, gradients = step(pipe, x)
    expected, _, exact = step(model, x, drawn)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, exact, rtol=1e-12, atol=1e-14)


def test_buffers_keep_what_the_samples_had() -> None:
    """Numbers that are written down are those which were used."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("last", "noise", "average"):
                self.register_buffer(name, torch.zeros(6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            t = torch.rand(6)
            self.last.copy_(t)
            self.noise.uniform_()
            self.average.lerp_(torch.rand(6), 0.5)
            return x * t, x * self.noise, x * self.average

    model = Keeps()
    pipe = autopipe.compile(model, 2, 3)
    for _ in range(2):
        results = pipe(torch.ones(7, 6))
        for used, buffer in zip(results, model.buffers(), strict=True):
            assert torch.equal(used, buffer.expand(7, 6))
            assert buffer.unique().numel() > 1


def test_the_number_stays_when_the_gradient_comes_from_elsewhere() -> None:
    """The program is then made anew and its forward run again, with the step's own seed."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            t = torch.rand(())
            return (x * self.one * t).sum(), torch.exp(x * self.one * t)

    pipe = autopipe.compile(Two(), 2, 3, remat="full")
    x = torch.ones(6, 6, requires_grad=True)
    total, exact = pipe(x)
    t = total.detach() / 36
    torch.testing.assert_close(exact, torch.exp(t).expand(6, 6))
    exact.sum().backward()
    torch.testing.assert_close(x.grad, (t * torch.exp(t)).expand(6, 6))


def test_a_shared_draw_is_another_call() -> None:
    """Identical stages share what is traced; one that draws for the batch is not identical."""
    stage = sole_stage(Shared(DRAWS["a mixing factor"]), batch())
    (rand,) = calls(stage.graph_module.graph, torch.ops.aten.rand.default)
    assert rand.meta["static"]
    assert fingerprint(stage.graph_module.graph) == stage.fingerprint
    del rand.meta["static"]
    assert fingerprint(stage.graph_module.graph) != stage.fingerprint
