"""Cut a batch into micro-batches (GPipe, Huang et al. 2019, section 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def sizes(batch: int, chunks: int, least: int = 1) -> tuple[int, ...]:
    """Samples per micro-batch: as even as possible, larger ones first, none empty.

    As `torch.tensor_split`, without its empty pieces: at most two different sizes.

    Args:
        batch: samples in the batch, at least 1.
        chunks: number of micro-batches, at least 1.
        least: samples that a micro-batch needs: then there are fewer micro-batches, at least one.

    >>> sizes(10, 4)
    (3, 3, 2, 2)
    >>> sizes(2, 4)
    (1, 1)
    >>> sizes(5, 4, least=2)
    (3, 2)
    """
    count = max(1, min(batch // least, chunks))
    small, extra = divmod(batch, count)
    return tuple(small + (i < extra) for i in range(count))


def scatter(tensor: Tensor, dim: int | None, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Cut a tensor into micro-batches.

    Args:
        tensor: the whole batch.
        dim: its batch dimension; None: it is not batched, and each micro-batch gets all of it.
        sizes: samples per micro-batch.

    Returns:
        Views of `tensor`, in order.
    """
    if dim is None:
        return (tensor,) * len(sizes)
    return (tensor,) if len(sizes) == 1 else torch.split(tensor, list(sizes), dim)
