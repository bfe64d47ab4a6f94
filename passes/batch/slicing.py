"""Slice a value by samples, and join the slices again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .lattice import Samples

if TYPE_CHECKING:
    from collections.abc import Sequence


def slice_samples(value: Any, state: Any, start: int, count: int) -> Any:
    """The part of a value that belongs to samples ``start … start + count - 1``.

    Args:
        value: a tensor, or a tuple or list of tensors.
        state: its state, or a tuple of states.
        start: the first sample.
        count: number of samples.

    Returns:
        A copy of the slice; the value itself if it holds no samples.
    """
    if isinstance(value, (tuple, list)):
        each = state if isinstance(state, tuple) else (state,) * len(value)
        return type(value)(
            slice_samples(v, s, start, count) for v, s in zip(value, each, strict=True)
        )
    if isinstance(state, Samples):
        dim = state.dim
        part = _blocks(value, state).narrow(dim + 1, start, count).flatten(dim, dim + 2)
        return part.clone()  # in its own memory, so that views of it cannot read other samples
    return value


def join_parts(parts: Sequence[Tensor], state: Samples) -> Tensor:
    """Join slices that together hold all samples: the inverse of `slice_samples`.

    Args:
        parts: the slices, in order.
        state: of the joined value.
    """
    dim = state.dim
    blocks = [_blocks(p, state) for p in parts]
    return torch.cat(blocks, dim + 1).flatten(dim, dim + 2)


def take_samples(value: Tensor, dim: int, count: int) -> Tensor:
    """Take `count` samples of `value` along `dim`.

    If there are fewer, samples are repeated; repeated ones are rolled along another dimension so
    that all samples differ.
    """
    if value.shape[dim] >= count:
        return value.narrow(dim, 0, count)
    samples = []
    for n in range(count):
        sample = value.narrow(dim, n % value.shape[dim], 1)
        turns = n // value.shape[dim]
        others = [d for d in range(value.dim()) if d != dim and value.shape[d] > 1]
        samples.append(sample.roll(turns, others[-1]) if turns and others else sample)
    return torch.cat(samples, dim)


def _blocks(value: Tensor, state: Samples) -> Tensor:
    """The samples' dimension unfolded to (batches, samples, per_sample)."""
    dim, shape = state.dim, value.shape
    return value.reshape(*shape[:dim], state.batches, -1, state.per_sample, *shape[dim + 1 :])
