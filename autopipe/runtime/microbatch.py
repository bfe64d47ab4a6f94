"""A batch as micro-batches, and micro-batch results as a batch's (GPipe, section 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def sizes(batch: int, chunks: int) -> tuple[int, ...]:
    """Samples per micro-batch: as even as possible, larger ones first, none empty.

    As `torch.tensor_split`, without its empty pieces: at most two different sizes.

    >>> sizes(10, 4)
    (3, 3, 2, 2)
    >>> sizes(2, 4)
    (1, 1)
    """
    count = min(batch, chunks)
    small, extra = divmod(batch, count)
    return tuple(small + (i < extra) for i in range(count))


def scatter(tensor: Tensor, dim: int, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of `tensor`, cut along `dim`."""
    return (tensor,) if len(sizes) == 1 else torch.split(tensor, list(sizes), dim)


def gather(how: str, dim: int | None, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """One value from the M that micro-batches gave.

    Args:
        how: "cat" along `dim`; "sum"; "mean" weighted by `sizes`; "same": the first.
        dim: for "cat".
        parts: one per micro-batch.
        sizes: samples per micro-batch.
    """
    if len(parts) == 1 or how == "same":
        return parts[0]
    if how == "cat":
        assert dim is not None
        return torch.cat(list(parts), dim)
    if how == "mean":
        batch = sum(sizes)
        parts = [p * (n / batch) for p, n in zip(parts, sizes, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def share(
    how: str, dim: int | None, gradient: Tensor, parts: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    """The gradients of the M values behind `gather`, given that of its result.

    Args:
        how: as for `gather`.
        dim: as for `gather`.
        gradient: of the combined value.
        parts: for "cat", how long each micro-batch's value is along `dim`.
        sizes: samples per micro-batch.
    """
    if len(sizes) == 1:
        return [gradient]
    if how == "cat":
        assert dim is not None
        return list(torch.split(gradient, list(parts), dim))
    if how == "sum":
        return [gradient] * len(sizes)
    batch = sum(sizes)
    return [gradient * (n / batch) for n in sizes]
