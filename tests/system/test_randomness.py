"""Promise 3, operator by operator: one seed, one result, whatever the plan.

Eager torch draws other numbers, so truth is every other plan of the same model, to the bit.
`tests/test_randomness_odds.py` asks whether the numbers are the right ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe

pytestmark = [pytest.mark.few(3), pytest.mark.usefixtures("alike_models_once")]

Op = Callable[[Tensor], Tensor]
PLANS = [(1, "none"), (2, "full"), (3, "min-cut"), (4, "full")]


class Twice(nn.Module):
    """An operator at two places, with something to learn before, between and after them."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(self.layers[0](x))
        x = self.op(torch.tanh(self.layers[1](x)))
        return self.layers[2](x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.cells = kind(6, 6, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.cells(torch.tanh(self.first(x)))[0]))


def shape(batch: int) -> Tensor:
    return torch.randn(batch, 4, 6, generator=torch.Generator().manual_seed(batch))


def picked(x: Tensor) -> Tensor:
    chosen = torch.multinomial(x.softmax(-1).flatten(0, 1), 6, replacement=True)
    return x.gather(-1, chosen.view(x.shape))


OPS: dict[str, Op] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout in place": lambda x: F.dropout(x * 2, 0.5, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x, 0.5),
    "dropout2d": lambda x: F.dropout2d(x.unsqueeze(-1), 0.5).squeeze(-1),
    "dropout3d": lambda x: F.dropout3d(x[..., None, None], 0.5).flatten(2),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel softmax": lambda x: x + F.gumbel_softmax(x, tau=0.7),
    "hard gumbel softmax": lambda x: x * F.gumbel_softmax(x, hard=True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "attention with heads": lambda x: F.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], dropout_p=0.5, is_causal=True
    )[:, 0],
    "drop path of transformers": lambda x: x / 0.5 * (0.5 + torch.rand(x.shape[0], 1, 1)).floor_(),
    "drop path of timm": lambda x: x * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5).div_(0.5),
    "randn_like": lambda x: x + torch.randn_like(x),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn": lambda x: x + torch.randn(x.shape),
    "randint": lambda x: x * torch.randint(0, 9, (x.shape[0], 1, 6)),
    "randint_like": lambda x: x * torch.randint_like(x, 9),
    "randint_like of a tensor": lambda x: x * torch.randint_like(x, torch.tensor(9)),
    "normal of a size": lambda x: x + torch.normal(0.0, 1.0, x.shape),
    "randperm": lambda x: x[..., torch.randperm(6)],
    "bernoulli": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
    "multinomial": picked,
    "normal": lambda x: x + torch.normal(x.detach(), 1.0),
    "normal_": lambda x: x + torch.empty_like(x).normal_(),
    "uniform_": lambda x: x + torch.empty_like(x).uniform_(-1, 1),
    "exponential_": lambda x: x * torch.empty_like(x).exponential_(),
    "log_normal_": lambda x: x * torch.empty_like(x).log_normal_(),
    "geometric_": lambda x: x * torch.empty_like(x).geometric_(0.5),
    "cauchy_": lambda x: torch.tanh(x + torch.empty_like(x).cauchy_()),
    "random_": lambda x: x * torch.empty_like(x).random_(9),
    "poisson": lambda x: x + torch.poisson(x.detach().abs()),
    "Normal": lambda x: torch.distributions.Normal(x, 1.0, validate_args=False).rsample(),
    "Normal, checked in eager": lambda x: torch.distributions.Normal(x, x.exp()).rsample(),
    "Gamma": lambda x: torch.distributions.Gamma(x.exp(), 1.0, validate_args=False).rsample(),
    "Categorical": lambda x: (
        x + torch.distributions.Categorical(logits=x, validate_args=False).sample()[..., None]
    ),
}
if torch.__version__ < "2.12":  # its operator cannot be exported there
    del OPS["Gamma"]
MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "transformer layer": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5, batch_first=True),
}
MODELS: dict[str, Callable[[], nn.Module]] = MODULES | {
    name: (lambda op=op: Twice(op)) for name, op in OPS.items()
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().train()


def step(pipe: autopipe.Pipeline, x: Tensor) -> list[Tensor]:
    """Result and gradients of a step, the input's among them."""
    pipe.zero_grad()
    x = x.clone().requires_grad_()
    out = pipe(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    gradients = [p.grad for p in pipe.parameters() if p.grad is not None]
    assert len(gradients) > 1
    return [out.detach(), x.grad, *gradients]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    assert len(a) == len(b)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_result_belongs_to_its_seed_whatever_the_plan(name: str) -> None:
    model, x = made(name), shape(6)
    runs = []
    for devices, remat in PLANS:
        pipe = autopipe.compile(model, devices, 3, remat=remat)
        torch.manual_seed(7)
        first, second = step(pipe, x), step(pipe, x)
        assert not torch.equal(first[0], second[0]), "a further call draws anew"
        torch.manual_seed(8)
        assert not torch.equal(step(pipe, x)[0], first[0]), "another seed, another result"
        torch.manual_seed(7)
        assert same(step(pipe, x), first), "the same seed again"
        runs.append(first + second)
    for run in runs[1:]:
        assert same(run, runs[0])


def swin() -> tuple[nn.Module, Tensor]:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 1],
        window_size=4,
        drop_path_rate=0.6,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    return SwinForImageClassification(config), torch.randn(6, 3, 16, 16)


def convnext() -> tuple[nn.Module, Tensor]:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 8], depths=[1, 2], drop_path_rate=0.6, image_size=16
    )
    return ConvNextForImageClassification(config), torch.randn(6, 3, 16, 16)


@pytest.mark.full
@pytest.mark.parametrize("make", [swin, convnext])
def test_stochastic_depth_of_real_models(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    torch.manual_seed(0)
    model, x = make()
    runs = []
    for devices, remat in PLANS[:3]:
        torch.manual_seed(0)
        pipe = autopipe.compile(model.train(), devices, 3, remat=remat)
        results = []
        for _ in range(2):
            pipe.zero_grad()
            logits = pipe(pixel_values=x).logits
            logits.pow(2).sum().backward()
            results += [logits.detach(), *(p.grad for p in model.parameters())]
        half = len(results) // 2
        assert not torch.equal(results[0], results[half])
        runs.append([r for r in results if r is not None])
    assert all(same(run, runs[0]) for run in runs)


# ------------------------------------------------------------------------------- the user's own


@pytest.mark.full
def test_the_generator_moves_on_the_same_way_whatever_the_plan() -> None:
    """So that data drawn between steps are the same; compiling moves nothing."""
    x, states = shape(7), []
    for devices, remat in PLANS:
        model = made("dropout")
        torch.manual_seed(5)
        pipe = autopipe.compile(model, devices, 3, remat=remat, args=(x,))
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())
        for batch in (7, 7, 4):
            step(pipe, shape(batch))
            states.append(torch.get_rng_state())
    assert len(states) == 3 * len(PLANS)
    for n, state in enumerate(states):
        assert torch.equal(state, states[n % 3])
    assert not torch.equal(states[0], states[1])


def test_a_first_call_draws_what_a_later_one_would() -> None:
    """Capturing and tracing on the way leave the generators of torch, Python and NumPy alone."""
    model, x = made("lstm"), shape(7)
    compiled, fresh = (autopipe.compile(model, 2, 3, args=a) for a in ((x,), ()))
    found = []
    for pipe in (compiled, fresh, fresh):
        torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
        found.append(step(pipe, x))
        found[-1].append(torch.tensor([random.random(), numpy.random.rand(), torch.rand(())]))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_a_state_that_is_put_back_repeats_the_step() -> None:
    """As trainers do when they go on from a checkpoint."""
    pipe, x = autopipe.compile(made("dropout"), 2, 3), shape(7)
    step(pipe, x)
    state = torch.get_rng_state()
    first = step(pipe, x), step(pipe, x)
    torch.set_rng_state(state)
    assert all(same(step(pipe, x), expected) for expected in first)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inside = step(pipe, x)
    after = step(pipe, x)
    torch.set_rng_state(state)
    step(pipe, x), step(pipe, x)
    assert same(step(pipe, x), after), "what was drawn inside of the fork is forgotten"
    assert not same(inside, after)


@pytest.mark.parametrize("training", [True, False])
def test_a_call_without_randomness_draws_nothing(training: bool) -> None:
    """As in eager torch: else a loop that shuffles or augments its data sees other data."""
    pipe = autopipe.compile(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5 * (not training))), 1, 3)
    pipe.train(training)
    torch.manual_seed(5)
    pipe(shape(7))
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())


def test_evaluation_is_not_random() -> None:
    for name in ("lstm", "transformer layer"):
        pipe, x = autopipe.compile(made(name).eval(), 2, 3), shape(7)
        with torch.no_grad():
            torch.testing.assert_close(pipe(x), pipe.model(x))
            assert torch.equal(pipe(x), pipe(x))


def python_number(x: Tensor) -> Tensor:
    return x * random.random()


def numpy_number(x: Tensor) -> Tensor:
    return x + float(numpy.random.rand())


@pytest.mark.parametrize("op", [python_number, numpy_number])
def test_randomness_that_torch_does_not_see(op: Op) -> None:
    """Refused, or drawn in every call: layer drop by `random.random()` is written so."""
    pipe, x = autopipe.compile(Twice(op), 2, 3), shape(7)
    try:
        assert not torch.equal(pipe(x), pipe(x))
    except autopipe.errors.AutopipeError:
        return


def test_a_layer_dropped_at_random_is_refused() -> None:
    """Control flow on a drawn number, as BART's and Wav2Vec2's layer drop."""

    def op(x: Tensor) -> Tensor:
        return x if torch.rand([]) < 0.5 else 2 * x

    with pytest.raises(autopipe.errors.CaptureError, match="depends on"):
        autopipe.compile(Twice(op), 2, 3)(shape(7))


def test_a_generator_of_ones_own() -> None:
    """Its numbers, or an error: not the default generator's instead."""
    generator = torch.Generator().manual_seed(1)
    pipe = autopipe.compile(Twice(lambda x: x + torch.randn(x.shape, generator=generator)), 2, 3)
    with pytest.raises(autopipe.errors.AutopipeError):
        pipe(shape(7))
