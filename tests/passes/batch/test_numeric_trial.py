"""Where the rules cannot decide, a few samples are run as a whole and in parts.

Covers batch/numeric_trial.py, batch/decide_states.py, batch/slicing.py and, with
`tests/passes/ops/test_autograd_function.py`, batch/backward_trial.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CouplingError
from tests.support.agreement import assert_agrees, pipelined
from tests.support.programs import captured_of

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("traces_once")]

WIDTH = 6


class Model(nn.Module):
    """``f(hidden, ids)`` between two layers; ids are tokens."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.f = f
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.f(self.table(ids), ids)))


def tokens(size: int = 7) -> Tensor:
    return torch.randint(0, 11, (size, 4), generator=torch.Generator().manual_seed(size))


def sorted_and_back(x: Tensor, ids: Tensor) -> Tensor:
    """As a mixture of experts: tokens grouped by kind, worked on, put back."""
    flat, kinds = x.flatten(0, 1), ids.flatten() % 3
    order = kinds.argsort()
    grouped = flat[order] * (kinds[order] + 1)[:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return grouped[back].view_as(x)


def scattered_back(x: Tensor, ids: Tensor) -> Tensor:
    flat, order = x.flatten(0, 1), ids.flatten().argsort()
    return torch.zeros_like(flat).index_add(0, order, flat[order].sin()).view_as(x)


def counted(x: Tensor, ids: Tensor) -> Tensor:
    """Offsets of groups, from a histogram over all samples, find the groups again."""
    kinds = ids.flatten() % 3
    order = kinds.argsort(stable=True)
    ends = nn.functional.one_hot(kinds, 3).sum(0).cumsum(0)
    group = torch.bucketize(torch.arange(order.shape[0]), ends, right=True)
    grouped = x.flatten(0, 1)[order] * (group + 1)[:, None]
    return torch.zeros_like(grouped).index_copy(0, order, grouped).view_as(x)


KEPT_APART = {f.__name__: f for f in (sorted_and_back, scattered_back, counted)}


@pytest.mark.parametrize("name", KEPT_APART)
def test_samples_that_are_mixed_and_put_back(name: str) -> None:
    pipe = pipelined(Model(KEPT_APART[name]))
    for size in (7, 6, 2):
        assert_agrees(pipe, tokens(size))
    assert "keeps samples apart, as a trial on 7 samples found" in pipe.explain()


def from_the_next(x: Tensor, ids: Tensor) -> Tensor:
    """By an index that is computed, from another sample."""
    return x[(ids[:, 0] * 0 + torch.arange(x.shape[0]) + 1) % x.shape[0]]


def not_put_back(x: Tensor, ids: Tensor) -> Tensor:
    return x.flatten(0, 1)[ids.flatten().argsort()].view_as(x)


def limited(x: Tensor, ids: Tensor) -> Tensor:
    """Of each kind the first three tokens of the batch: a full expert drops the others."""
    kinds = nn.functional.one_hot(ids.flatten() % 3, 3)
    place = (kinds.cumsum(0) * kinds).sum(-1)
    return x * (place <= 3).view(*ids.shape, 1)


def written_by_another_name(x: Tensor, ids: Tensor) -> Tensor:
    """The base of a view that mixed values were written to."""
    flat, base = x.flatten(0, 1), torch.zeros_like(x)
    base.view(-1, WIDTH).copy_(flat[ids.flatten().argsort()])
    return base


MIXED = {f.__name__: f for f in (from_the_next, not_put_back, limited, written_by_another_name)}


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_stay_mixed_are_refused(name: str) -> None:
    with pytest.raises(CouplingError) as caught:
        pipelined(Model(MIXED[name]))(tokens())
    assert str(caught.value.source).startswith(__file__)


def until_full(x: Tensor, ids: Tensor) -> Tensor:
    """The first twelve tokens of each kind: a few samples do not fill an expert."""
    kinds = nn.functional.one_hot(ids.flatten() % 3, 3)
    place = (kinds.cumsum(0) * kinds).sum(-1)
    return x * (place <= 12).view(*ids.shape, 1)


def up_to_the_largest(x: Tensor, ids: Tensor) -> Tensor:
    """Of all samples, which may be the last."""
    return torch.where((torch.arange(WIDTH) + 6 < ids.max()), x, x.sin())


@pytest.mark.parametrize("f", [until_full, up_to_the_largest])
def test_what_shows_in_larger_batches_only_is_refused(f: Callable[..., Tensor]) -> None:
    ids = tokens(16).clamp(max=6)
    ids[-1] = 10
    with pytest.raises(CouplingError):
        pipelined(Model(f))(ids)


def test_an_index_that_is_good_for_the_whole_batch_only() -> None:
    """Hard negatives: the trial itself cannot even run."""

    class Negatives(nn.Module):
        def forward(self, x: Tensor, negative: Tensor) -> Tensor:
            return (x * x[negative]).sum(1)

    for size in (8, 40):
        with pytest.raises(CouplingError, match="picked from other samples"):
            pipelined(Negatives())(torch.randn(size, 6), torch.arange(size).flip(0))


def test_attention_without_dropout_is_tried() -> None:
    """Its operator could draw random numbers; with no dropout it does not."""

    def attends(x: Tensor, ids: Tensor) -> Tensor:
        rows = torch.remainder(ids, 3)[torch.arange(ids.shape[0])]  # undecided, and the same
        order = ids[:, 0].argsort()
        mask = rows[order].argsort()[order.argsort()]
        y = x[order][order.argsort()]
        return nn.functional.scaled_dot_product_attention(y, y, y) + 0 * mask[..., None]

    assert_agrees(pipelined(Model(attends)), tokens())


def test_a_trial_leaves_everything_as_it_was() -> None:
    class Counts(Model):
        def __init__(self) -> None:
            super().__init__(sorted_and_back)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, ids: Tensor) -> Tensor:
            self.steps += 1
            return nn.functional.dropout(super().forward(ids), 0.5)

    model = Counts()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    captured = captured_of(model, tokens())
    assert any("trial" in note for note in captured.notes)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_one_sample_is_enough_to_try_with() -> None:
    """It is turned, so that the five differ."""
    pipe = pipelined(Model(sorted_and_back), chunks=2)
    assert_agrees(pipe, tokens(1))
    with pytest.raises(CouplingError):
        pipelined(Model(not_put_back), chunks=2)(tokens(1))


def test_without_weights_it_is_believed_and_said() -> None:
    with torch.device("meta"):
        model = Model(sorted_and_back)
    plan = autopipe.plan(model, 2, 3, args=(tokens().to("meta"),))
    assert "was not tried, the model has no weights" in str(plan)


# ------------------------------------------------------------------------------- out_reduce


def weighted(parts: list[Any], sizes: list[int], how: str) -> Tensor:
    weights = [n / sum(sizes) if how == "mean" else 1.0 for n in sizes]
    return torch.stack([p * w for p, w in zip(parts, weights, strict=True)]).sum()


class Loss(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.f = nn.Linear(WIDTH, WIDTH).double(), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.layer(x))


def contrastive(y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(y @ y.T, torch.arange(y.shape[0]))


STATED: dict[str, Callable[[Tensor], Tensor]] = {
    "log of summed exponentials": lambda y: y.logsumexp(0).mean(),
    "contrastive": contrastive,
    "maximum": lambda y: y.max(),
    "less the mean": lambda y: (y - y.mean(0)).square().sum(),
}


@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("name", STATED)
def test_a_rule_that_is_stated(name: str, how: str) -> None:
    """For a number whose combination cannot be derived; gradients follow it."""
    model, x = Loss(STATED[name]), torch.randn(7, WIDTH, dtype=torch.float64)
    with pytest.raises(CouplingError, match="out_reduce"):
        pipelined(model)(x)
    found = pipelined(model, out_reduce=how)(x)
    parts = list(x.tensor_split(3))
    expected = weighted([model(p) for p in parts], [len(p) for p in parts], how)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(torch.autograd.grad(found, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_stated_rule_does_not_touch_what_can_be_derived() -> None:
    model = Loss(lambda y: nn.functional.mse_loss(y, y.detach() + 1) * y.sum())
    pipe = pipelined(model, out_reduce="sum")
    assert_agrees(pipe, torch.randn(7, WIDTH, dtype=torch.float64))


def test_a_stated_rule_is_for_single_numbers() -> None:
    with pytest.raises(CouplingError):
        pipelined(Loss(lambda y: y.softmax(0)), out_reduce="mean")(torch.randn(7, 6).double())
