"""Batches cut into micro-batches, against `torch.tensor_split`."""

from __future__ import annotations

import doctest

import pytest
import torch

from autopipe.runtime import microbatch

SIZES = [(1, 1), (1, 4), (2, 4), (4, 3), (7, 3), (10, 4), (64, 8)]


@pytest.mark.parametrize(("batch", "chunks"), [(b, c) for b in range(1, 13) for c in range(1, 9)])
def test_sizes_are_those_of_tensor_split_without_empties(batch: int, chunks: int) -> None:
    expected = [len(part) for part in torch.arange(batch).tensor_split(chunks) if len(part)]
    assert list(microbatch.sizes(batch, chunks)) == expected
    assert len(set(expected)) <= 2


@pytest.mark.parametrize("least", [2, 3, 5])
@pytest.mark.parametrize(("batch", "chunks"), [(b, c) for b in range(1, 13) for c in range(1, 9)])
def test_no_micro_batch_is_smaller_than_asked(batch: int, chunks: int, least: int) -> None:
    """There are as many as can be; one if the batch itself is smaller."""
    sizes = microbatch.sizes(batch, chunks, least)
    assert sum(sizes) == batch
    assert min(sizes) >= min(least, batch)
    many = range(1, chunks + 1)
    assert len(sizes) == max(n for n in many if min(microbatch.sizes(batch, n)) >= least or n == 1)


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


def test_one_micro_batch_is_the_batch_itself() -> None:
    value = torch.randn(5)
    assert microbatch.scatter(value, 0, [5]) == (value,)
