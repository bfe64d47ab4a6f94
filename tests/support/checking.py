"""Forwards that check values of tensors: ``f(labels, x)`` raises, or returns a loss of both.

They are here, and not in a file of tests, because pytest rewrites the ``assert``s of those.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 3
TORCH_ASSERT: Any = vars(torch)["_assert"]


def loss(x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x[:, :CLASSES], labels)


def raises(x: Tensor, labels: Tensor) -> Tensor:
    if labels.max() >= CLASSES:
        raise ValueError("a label is too large")
    return loss(x, labels)


def raises_for_one_of_two(x: Tensor, labels: Tensor) -> Tensor:
    if labels.min() < 0 or labels.max() >= CLASSES:
        message = f"labels from {labels.min()} to {labels.max()}"
        raise ValueError(message)
    return loss(x, labels)


def raises_second(x: Tensor, labels: Tensor) -> Tensor:
    if x.isnan().any():
        raise RuntimeError("NaN")
    elif not x.isfinite().all():
        raise RuntimeError("infinite")
    return loss(x, labels)


def raises_else(x: Tensor, labels: Tensor) -> Tensor:
    if (labels < CLASSES).all():
        x = x * 2
    else:
        raise ValueError("a label is too large")
    return loss(x, labels)


def asserts(x: Tensor, labels: Tensor) -> Tensor:
    assert x.isfinite().all()
    return loss(x, labels)


def asserts_not(x: Tensor, labels: Tensor) -> Tensor:
    assert not torch.isnan(x).any(), "NaN"
    return loss(x, labels)


def asserts_a_chain(x: Tensor, labels: Tensor) -> Tensor:
    assert 0 <= labels.min() <= labels.max() < CLASSES and x.shape[1] > 1  # noqa: PT018
    return loss(x, labels)


def asserts_either(x: Tensor, labels: Tensor) -> Tensor:
    assert (labels >= 0).all() or not x.isfinite().all()
    return loss(x, labels)


def asserts_a_number(x: Tensor, labels: Tensor) -> Tensor:
    assert labels.max().item() < CLASSES
    return loss(x, labels)


def asserts_by_torch(x: Tensor, labels: Tensor) -> Tensor:
    TORCH_ASSERT(x.isfinite().all(), "not finite")
    return loss(x, labels)


def asserts_equal(x: Tensor, labels: Tensor) -> Tensor:
    assert torch.equal(labels, labels.abs())
    assert x.allclose(x.contiguous())
    return loss(x, labels)


def asks_for_a_bool(x: Tensor, labels: Tensor) -> Tensor:
    if bool(torch.isnan(x).any()) or torch.isinf(x).any().item():
        raise ValueError("not finite")
    return loss(x, labels)


def any_of_some(x: Tensor, labels: Tensor) -> Tensor:
    if any([t.isnan().any() for t in (x, x * 2)]):  # noqa: C419
        raise ValueError("NaN")
    return loss(x, labels)


def _check(labels: Tensor) -> None:
    if (labels >= CLASSES).any():
        raise ValueError


def in_a_function(x: Tensor, labels: Tensor) -> Tensor:
    _check(labels)
    return loss(x, labels)


CHECKS: list[Callable[[Tensor, Tensor], Tensor]] = [
    *(raises, raises_for_one_of_two, raises_second, raises_else, asserts, asserts_not),
    *(asserts_a_chain, asserts_either, asserts_a_number, asserts_by_torch, asserts_equal),
    *(asks_for_a_bool, any_of_some, in_a_function),
]


def computes(x: Tensor, labels: Tensor) -> Tensor:
    if x.sum() > 0:
        x = x * 2
    return loss(x, labels)


def chooses(x: Tensor, labels: Tensor) -> Tensor:
    return loss(x * 2 if x.sum() > 0 else x, labels)


def returns_early(x: Tensor, labels: Tensor) -> Tensor:
    if labels.max() >= CLASSES:
        return x.sum()
    return loss(x, labels)


def only_warns(x: Tensor, labels: Tensor) -> Tensor:
    if x.isnan().any():
        warnings.warn("NaN", stacklevel=1)
    return loss(x, labels)


def catches(x: Tensor, labels: Tensor) -> Tensor:
    try:
        if labels.max() >= CLASSES:
            raise ValueError
    except ValueError:
        x = x * 2
    return loss(x, labels)


def catches_outside(x: Tensor, labels: Tensor) -> Tensor:
    try:
        _check(labels)
    except ValueError:
        x = x * 2
    return loss(x, labels)


def catches_by_context(x: Tensor, labels: Tensor) -> Tensor:
    import contextlib

    with contextlib.suppress(ValueError):
        _check(labels)
        x = x * 2
    return loss(x, labels)


def leaves_finally(x: Tensor, labels: Tensor) -> Tensor:
    try:
        _check(labels)
        x = x * 2
    finally:
        return loss(x, labels)  # noqa: B012


def keeps_what_it_compares(x: Tensor, labels: Tensor) -> Tensor:
    if (most := labels.max()) >= CLASSES:
        raise ValueError
    return loss(x, labels) * most


def looks_it_up(x: Tensor, labels: Tensor) -> Tensor:
    if labels.max() not in (0, 1, 2):
        raise ValueError
    return loss(x, labels)


def raises_in_a_branch(x: Tensor, labels: Tensor) -> Tensor:
    if labels.max() >= CLASSES:
        if len(x.shape) > 2:
            raise ValueError
        x = x * 2
    return loss(x, labels)


BRANCHES: list[Callable[[Tensor, Tensor], Tensor]] = [
    *(computes, chooses, returns_early, only_warns, catches, catches_outside, catches_by_context),
    *(leaves_finally, keeps_what_it_compares, looks_it_up, raises_in_a_branch),
]
