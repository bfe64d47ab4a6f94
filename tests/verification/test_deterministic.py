"""A model without randomness, and with batch norm by micro-batch, against eager torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.verification.deterministic import MicroBatchNorm, NoRandomness

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

RANDOM: dict[str, Callable[[], Any]] = {
    "dropout": lambda: F.dropout(X, 0.5),
    "feature dropout": lambda: F.dropout1d(X, 0.5),
    "rand": lambda: torch.rand(3),
    "randn_like": lambda: torch.randn_like(X),
    "normal_": lambda: X.clone().normal_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((9,), 0.5)),
    "randint": lambda: torch.randint(2, 9, (5,)),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, None, 0.5),
    "gumbel": lambda: F.gumbel_softmax(X),
    "rrelu": lambda: F.rrelu(X, training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_functions_return_the_same_twice(name: str) -> None:
    assert not torch.equal(RANDOM[name](), RANDOM[name]())
    with NoRandomness():
        assert torch.equal(RANDOM[name](), RANDOM[name]())


def test_dropout_drops_nothing_and_noise_is_constant() -> None:
    with NoRandomness():
        assert torch.equal(F.dropout(X, 0.5), X)
        assert torch.equal(F.dropout(input=X, p=0.5), X)
        assert torch.equal(torch.rand(3), torch.full((3,), 0.5))
        assert torch.equal(torch.randint(2, 9, (5,)), torch.full((5,), 2))
        plain = F.scaled_dot_product_attention(X, X, X)
        assert torch.equal(F.scaled_dot_product_attention(X, X, X, None, 0.5), plain)


def test_other_draws_stay_random() -> None:
    with NoRandomness():
        assert not torch.equal(torch.poisson(X.abs() * 9), torch.poisson(X.abs() * 9))


@pytest.mark.parametrize("deferred", [False, True])
def test_batch_norm_by_micro_batch(deferred: bool) -> None:
    ours, parts, whole = (nn.BatchNorm1d(4) for _ in range(3))
    with MicroBatchNorm([4, 2], deferred=deferred):
        found = ours(X)
    expected = torch.cat([parts(X[:4]), parts(X[4:])])
    whole(X)
    assert torch.equal(found, expected)
    statistics: Tensor = (whole if deferred else parts).running_mean
    assert torch.equal(ours.running_mean, statistics)


def test_batch_norm_in_evaluation_is_not_changed() -> None:
    norm = nn.BatchNorm1d(4).eval()
    with MicroBatchNorm([4, 2], deferred=True):
        assert torch.equal(norm(X), (X / torch.sqrt(torch.tensor(1 + 1e-5))))
