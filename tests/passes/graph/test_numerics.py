"""Equality up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import inf, nan

from autopipe.passes.graph.numerics import is_close, is_inexact

BASE = torch.tensor([1.0, -100.0, 0.0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [(0, True), (5e-3, True), (2e-2, False)],  # the tolerance is 1e-4 of the largest entry
)
def test_differences_count_by_the_largest_entry(change: float, expected: bool) -> None:
    assert is_close(BASE + change, BASE) == expected


@pytest.mark.parametrize(
    ("dtype", "change", "expected"),
    [
        (torch.float64, 1e-6, False),
        (torch.float64, 1e-8, True),
        (torch.bfloat16, 1, True),
        (torch.bfloat16, 4, False),
        (torch.complex64, 5e-3, True),
        (torch.complex64, 2e-2, False),
    ],
)
def test_shorter_types_may_differ_more(dtype: torch.dtype, change: float, expected: bool) -> None:
    base = BASE.to(dtype)
    assert is_close(base + change, base) == expected


def test_shape_and_dtype_count() -> None:
    assert not is_close(BASE, BASE[None])
    assert not is_close(BASE, BASE.double())


def test_integers_and_booleans_must_be_equal() -> None:
    big = torch.tensor([10**9])
    assert is_close(big, big.clone())
    assert not is_close(big, big + 1)
    assert not is_close(torch.tensor([True]), torch.tensor([False]))


def test_what_is_not_finite_must_be_the_same() -> None:
    odd = torch.tensor([inf, -inf, nan, 1.0])
    assert is_close(odd, odd.clone())
    assert not is_close(-odd, odd)
    assert not is_close(torch.tensor([inf]), torch.tensor([1.0]))


def test_empty_tensors_are_equal() -> None:
    assert is_close(torch.empty(0), torch.empty(0))


def test_what_is_rounded() -> None:
    rounded = [t for t in (torch.half, torch.double, torch.cfloat) if is_inexact(BASE.to(t))]
    assert len(rounded) == 3
    assert not any(is_inexact(BASE.to(t)) for t in (torch.bool, torch.long))
