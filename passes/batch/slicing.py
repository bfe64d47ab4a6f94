"""A value cut into the parts that belong to some of the samples, and put together again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .lattice import Samples

if TYPE_CHECKING:
    from collections.abc import Sequence


def cut(value: Any, state: Any, start: int, count: int) -> Any:
    """The part of a value that belongs to `count` samples from `start` on."""
    if isinstance(value, (tuple, list)):
        each = state if isinstance(state, tuple) else (state,) * len(value)
        return type(value)(cut(v, s, start, count) for v, s in zip(value, each, strict=True))
    if isinstance(state, Samples):
        dim = state.dim
        part = _blocks(value, state).narrow(dim + 1, start, count).flatten(dim, dim + 2)
        return part.clone()  # whoever looks at its memory sees no other part's
    return value


def put_together(parts: Sequence[Tensor], state: Samples) -> Tensor:
    """The inverse of `cut`."""
    dim = state.dim
    blocks = [_blocks(p, state) for p in parts]
    return torch.cat(blocks, dim + 1).flatten(dim, dim + 2)


def _blocks(value: Tensor, state: Samples) -> Tensor:
    """The dimension of the samples unfolded to (outer, samples, inner)."""
    dim, shape = state.dim, value.shape
    return value.reshape(*shape[:dim], state.outer, -1, state.inner, *shape[dim + 1 :])
