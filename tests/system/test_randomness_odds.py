"""Promise 3: a backward meets its forward's masks, and draws have the distributions they should.

Truth is the mask that the forward used, read off its result, and the distribution itself, within
bounds that hold for all but one seed in a billion (`within`).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from tests.system.test_randomness import OPS, Op

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("alike_models_once")]

# ------------------------------------------------------------------------------- masks


class Masked(nn.Module):
    """Its result and its input's gradient are zero where dropout has hit, and nowhere else."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 64))
        self.more = layers - 1

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x.exp() * self.scale, 0.5)
        for _ in range(self.more):
            x = F.dropout(x / (1 + x), 0.5)
        return x


@pytest.mark.parametrize("remat", ["none", "full", "min-cut"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_backward_meets_the_masks_of_its_own_forward(remat: str, layers: int) -> None:
    """Two calls in flight, backward in either order: each recomputes what it drew itself."""
    pipe = autopipe.compile(Masked(layers), 2, 3, remat=remat)
    for order in ((0, 1), (1, 0)):
        inputs = [torch.randn(7, 4, 64, requires_grad=True) for _ in range(2)]
        outs = [pipe(x) for x in inputs]
        assert not torch.equal(outs[0] == 0, outs[1] == 0)
        for n in order:
            outs[n].sum().backward()
        for x, out in zip(inputs, outs, strict=True):
            assert torch.equal(x.grad == 0, out == 0)


def test_the_masks_stay_when_the_gradient_comes_from_elsewhere() -> None:
    """The program is then made anew and its forward run again, with the step's own seed."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Masked(), Masked()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x), self.last(2 * x)

    pipe = autopipe.compile(Two(), 2, 3, remat="full")
    for which in (0, 1, 1, 0):
        x = torch.randn(7, 4, 64, requires_grad=True)
        out = pipe(x)[which]
        out.sum().backward()
        assert torch.equal(x.grad == 0, out == 0)


# ------------------------------------------------------------------------------- distributions


def within(count: int) -> float:
    """How far a mean of `count` numbers in [0, 1] may be from its expectation (Hoeffding)."""
    return math.sqrt(math.log(2 / 1e-9) / (2 * count))


def drawn(op: Op, x: Tensor, chunks: int = 4) -> Tensor:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return op(x * self.one)

    torch.manual_seed(3)
    return autopipe.compile(Once(), 1, chunks)(x).detach()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_as_many_as_it_says(p: float) -> None:
    out = drawn(lambda x: F.dropout(x, p), torch.ones(64, 512))
    kept = out != 0
    assert torch.equal(out[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    assert abs(kept.double().mean() - (1 - p)) < within(out.numel())
    for part in kept.chunk(4):
        assert abs(part.double().mean() - (1 - p)) < within(part.numel())


def test_dropout_of_micro_batches_and_calls_is_unrelated() -> None:
    """Two masks of probability ½ agree at half of the places."""
    pipe = autopipe.compile(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0)), 1, 4)
    masks = [part != 0 for _ in range(2) for part in pipe(torch.ones(64, 512)).chunk(4)]
    for n, a in enumerate(masks):
        for b in masks[:n]:
            assert abs((a == b).double().mean() - 0.5) < within(a.numel())


def test_two_places_of_one_model_draw_apart() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return F.dropout(x, 0.5), F.dropout(x, 0.5)

    a, b = autopipe.compile(Both(), 2, 4)(torch.ones(64, 512))
    assert abs(((a == 0) == (b == 0)).double().mean() - 0.5) < within(a.numel())


def test_feature_dropout_takes_whole_channels() -> None:
    for op in (OPS["dropout2d"], OPS["dropout1d"], OPS["feature alpha dropout"]):
        out = drawn(op, torch.ones(64, 128, 3))
        assert (out == out[..., :1]).all()
        low = out[..., 0] == out.min()
        assert abs(low.double().mean() - 0.5) < within(low.numel())


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    x = torch.randn(256, 512)
    out = drawn(OPS["alpha dropout"], x)
    # Standard errors of mean and variance, with fourth moments of the order of 1: five of them.
    bound = 5 * math.sqrt(2 / x.numel())
    assert abs(out.mean() - x.mean()) < bound
    assert abs(out.var() - x.var()) < bound


@pytest.mark.parametrize("kind", ["drop path of transformers", "drop path of timm"])
def test_drop_path_takes_whole_samples(kind: str) -> None:
    out = drawn(OPS[kind], torch.ones(4096, 2, 3))
    assert (out == out[:, :1, :1]).all()
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert abs((out[:, 0, 0] != 0).double().mean() - 0.5) < within(4096)


def test_attention_drops_weights() -> None:
    """Of 64 equal keys, with the identity for values: the result is the masked weights."""
    identity = torch.eye(64).expand(16, 64, 64)
    out = drawn(lambda x: F.scaled_dot_product_attention(0 * x, 0 * x, x, dropout_p=0.25), identity)
    kept = out != 0
    assert torch.allclose(out[kept], torch.tensor(1 / 64 / 0.75))
    assert abs(kept.double().mean() - 0.75) < within(out.numel())


def test_rrelu_draws_its_slopes_between_its_limits() -> None:
    slopes = -drawn(lambda x: F.rrelu(x, 0.2, 0.6, training=True), -torch.ones(64, 512))
    assert 0.2 <= slopes.min() < 0.21
    assert 0.59 < slopes.max() <= 0.6
    assert abs(((slopes - 0.2) / 0.4).double().mean() - 0.5) < within(slopes.numel())


def test_choices_have_the_probabilities_asked_for() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    x = p.log().expand(8192, 4)
    picks: dict[str, Op] = {
        "gumbel": lambda x: F.gumbel_softmax(x, hard=True),
        "multinomial": lambda x: F.one_hot(torch.multinomial(x.exp(), 1)[:, 0], 4) + 0 * x,
        "bernoulli": lambda x: torch.bernoulli(x.exp().detach()) + 0 * x,
    }
    for name, op in picks.items():
        found = drawn(op, x).double().mean(0)
        assert (found - p).abs().max() < within(8192), name


def test_normal_numbers_are_normal() -> None:
    """By their distribution function: the share below each of some limits."""
    out = drawn(lambda x: 0 * x + torch.randn_like(x), torch.zeros(64, 512))
    for limit in (-2.0, -1.0, 0.0, 0.5, 1.5):
        expected = 0.5 * (1 + math.erf(limit / math.sqrt(2)))
        assert abs((out < limit).double().mean() - expected) < within(out.numel())
