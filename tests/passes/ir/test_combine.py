"""How micro-batches' values are combined, and gradients shared: against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopipe.passes.ir.combine import MEAN, REDUCTIONS, SAME, SUM, Combine, Concatenate
from autopipe.runtime import microbatch

SIZES = [(1, 1), (1, 4), (2, 4), (4, 3), (7, 3), (10, 4), (64, 8)]


def leaves(sizes: tuple[int, ...], *rest: int, scale: int = 1) -> list[Tensor]:
    made = [torch.randn(scale * n, *rest, dtype=torch.float64) for n in sizes]
    return [p.requires_grad_() for p in made]


@pytest.mark.parametrize(("batch", "chunks"), SIZES)
def test_sums_and_means_are_the_batchs(batch: int, chunks: int) -> None:
    sizes = microbatch.sizes(batch, chunks)
    parts = leaves(sizes, 4)
    whole = torch.cat(parts)
    sums, means = [p.sum(0) for p in parts], [p.mean(0) for p in parts]
    torch.testing.assert_close(SUM.gather(sums, sizes), whole.sum(0))
    torch.testing.assert_close(MEAN.gather(means, sizes), whole.mean(0))


@pytest.mark.parametrize(("batch", "chunks"), SIZES)
@pytest.mark.parametrize("scale", [1, 3])
def test_values_are_concatenated_whatever_a_sample_gives(
    batch: int, chunks: int, scale: int
) -> None:
    """A micro-batch of n samples may yield `scale` × n rows."""
    sizes = microbatch.sizes(batch, chunks)
    parts = leaves(sizes, 4, scale=scale)
    assert torch.equal(Concatenate(0).gather(parts, sizes), torch.cat(parts))
    turned = [p.t() for p in parts]
    assert torch.equal(Concatenate(1).gather(turned, sizes), torch.cat(parts).t())


@pytest.mark.parametrize(("batch", "chunks"), SIZES)
@pytest.mark.parametrize("combine", [Concatenate(0), SUM, MEAN], ids=str)
def test_shares_of_a_gradient_are_autograds(batch: int, chunks: int, combine: Combine) -> None:
    sizes = microbatch.sizes(batch, chunks)
    parts = leaves(sizes, 4) if combine.copies else leaves((2,) * len(sizes), 4)
    whole = combine.gather(parts, sizes)
    gradient = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, parts, gradient)
    found = combine.share(gradient, combine.saved_for_share(parts), sizes)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("batch", "chunks"), SIZES)
def test_what_does_not_depend_on_the_batch_is_taken_once(batch: int, chunks: int) -> None:
    sizes = microbatch.sizes(batch, chunks)
    value, gradient = torch.randn(4), torch.randn(4, dtype=torch.float64)
    assert SAME.gather([value] * len(sizes), sizes) is value
    shares = SAME.share(gradient, None, sizes)
    assert len(shares) == len(sizes)
    torch.testing.assert_close(torch.stack(shares).sum(0), gradient)


def test_one_micro_batch_costs_no_arithmetic() -> None:
    value = torch.randn(5)
    for combine in (Concatenate(0), SUM, MEAN, SAME):
        assert combine.gather([value], [5]) is value
        assert combine.share(value, combine.saved_for_share([value]), [5]) == [value]


def test_what_a_rule_says_of_itself() -> None:
    assert [str(c) for c in (Concatenate(1), SUM, MEAN, SAME)] == ["cat", "sum", "mean", "same"]
    assert REDUCTIONS == {"mean": MEAN, "sum": SUM}
    assert all(c.is_reduction for c in REDUCTIONS.values())
    assert not Concatenate(0).is_reduction
    assert not SAME.is_reduction
    assert [c.copies for c in (Concatenate(0), SUM, MEAN, SAME)] == [True, False, False, False]
    assert Concatenate(0) == Concatenate(0) != Concatenate(1)
