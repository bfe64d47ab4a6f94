"""Batches cut and put together: against `torch.tensor_split` and autograd."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from autopipe.runtime import microbatch

SIZES = [(1, 1), (1, 4), (2, 4), (4, 3), (7, 3), (10, 4), (64, 8)]


@pytest.mark.parametrize(("batch", "chunks"), [(b, c) for b in range(1, 13) for c in range(1, 9)])
def test_sizes_are_those_of_tensor_split_without_empties(batch: int, chunks: int) -> None:
    expected = [len(part) for part in torch.arange(batch).tensor_split(chunks) if len(part)]
    assert list(microbatch.sizes(batch, chunks)) == expected
    assert len(set(expected)) <= 2


def test_examples_of_the_docstring() -> None:
    assert doctest.testmod(microbatch).failed == 0


@pytest.mark.parametrize(("batch", "chunks"), SIZES)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_parts_are_views_that_cover_the_batch(batch: int, chunks: int, dim: int) -> None:
    shape = [3, 4, 5]
    shape[dim] = batch
    whole = torch.randn(shape)
    sizes = microbatch.sizes(batch, chunks)
    parts = microbatch.scatter(whole, dim, sizes)
    assert [p.shape[dim] for p in parts] == list(sizes)
    assert torch.equal(torch.cat(parts, dim), whole)
    assert {p.untyped_storage().data_ptr() for p in parts} == {whole.untyped_storage().data_ptr()}


def leaves(sizes: tuple[int, ...], *rest: int, scale: int = 1) -> list[Tensor]:
    made = [torch.randn(scale * n, *rest, dtype=torch.float64) for n in sizes]
    return [p.requires_grad_() for p in made]


@pytest.mark.parametrize(("batch", "chunks"), SIZES)
def test_sums_and_means_are_the_batchs(batch: int, chunks: int) -> None:
    sizes = microbatch.sizes(batch, chunks)
    parts = leaves(sizes, 4)
    whole = torch.cat(parts)
    sums, means = [p.sum(0) for p in parts], [p.mean(0) for p in parts]
    torch.testing.assert_close(microbatch.gather("sum", None, sums, sizes), whole.sum(0))
    torch.testing.assert_close(microbatch.gather("mean", None, means, sizes), whole.mean(0))


@pytest.mark.parametrize(("batch", "chunks"), SIZES)
@pytest.mark.parametrize("scale", [1, 3])
def test_values_are_concatenated_whatever_a_sample_gives(
    batch: int, chunks: int, scale: int
) -> None:
    """A micro-batch of n samples may yield `scale` × n rows."""
    sizes = microbatch.sizes(batch, chunks)
    parts = leaves(sizes, 4, scale=scale)
    assert torch.equal(microbatch.gather("cat", 0, parts, sizes), torch.cat(parts))
    turned = [p.t() for p in parts]
    assert torch.equal(microbatch.gather("cat", 1, turned, sizes), torch.cat(parts).t())


@pytest.mark.parametrize(("batch", "chunks"), SIZES)
@pytest.mark.parametrize(("how", "dim"), [("cat", 0), ("sum", None), ("mean", None)])
def test_shares_of_a_gradient_are_autograds(
    batch: int, chunks: int, how: str, dim: int | None
) -> None:
    sizes = microbatch.sizes(batch, chunks)
    parts = leaves(sizes, 4) if how == "cat" else leaves((2,) * len(sizes), 4)
    whole = microbatch.gather(how, dim, parts, sizes)
    gradient = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, parts, gradient)
    extents = [p.shape[0] for p in parts] if how == "cat" else []
    found = microbatch.share(how, dim, gradient, extents, sizes)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("batch", "chunks"), SIZES)
def test_what_does_not_depend_on_the_batch_is_taken_once(batch: int, chunks: int) -> None:
    sizes = microbatch.sizes(batch, chunks)
    value, gradient = torch.randn(4), torch.randn(4, dtype=torch.float64)
    assert microbatch.gather("same", None, [value] * len(sizes), sizes) is value
    shares = microbatch.share("same", None, gradient, [], sizes)
    assert len(shares) == len(sizes)
    torch.testing.assert_close(torch.stack(shares).sum(0), gradient)


def test_one_micro_batch_costs_no_arithmetic() -> None:
    value = torch.randn(5)
    for how, dim in (("cat", 0), ("sum", None), ("mean", None), ("same", None)):
        assert microbatch.gather(how, dim, [value], [5]) is value
        assert microbatch.share(how, dim, value, [5], [5]) == [value]
    assert microbatch.scatter(value, 0, [5]) == (value,)
