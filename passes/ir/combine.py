"""How the micro-batches' values of one output become the whole batch's.

Each rule is one small object: it gathers M values into one, shares the gradient of the result
among the M micro-batches, and says whether it reduces the batch (as a loss does).

    object            value of the batch             gradient of micro-batch m
    Concatenate(dim)  [v_1, ..., v_M] along `dim`    its part of g along `dim`
    SUM               Σ v_m                          g
    MEAN              Σ (n_m / N) v_m                (n_m / N) g
    SAME              v_1, as all are equal          (n_m / N) g

Here n_m is the number of samples of micro-batch m and N that of the batch. To add a reduction,
write a class, add its object to `REDUCTIONS`, and return that object from the rule which
recognises it (`passes/batch/rules_math.py` or `rules_losses.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Combine(ABC):
    """A rule that combines the micro-batches' values of one output.

    Attributes:
        name: what printed programs call it; a reduction's is also accepted as ``out_reduce``.
        is_reduction: whether the batch is reduced, as by a loss. A training loop usually
            differentiates reduced results only.
        copies: whether gathering copies all values into new memory.
    """

    name: ClassVar[str]
    is_reduction: ClassVar[bool] = False
    copies: ClassVar[bool] = False

    def gather(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Combine the micro-batches' values.

        Args:
            parts: the values, one per micro-batch.
            sizes: samples per micro-batch.

        Returns:
            The value for the whole batch; for a single micro-batch, its value itself.
        """
        return parts[0] if len(parts) == 1 else self._gather(parts, sizes)

    def share(self, gradient: Tensor, saved: Any, sizes: Sequence[int]) -> list[Tensor]:
        """Share a gradient among the micro-batches: the backward of `gather`.

        Args:
            gradient: of the gathered value.
            saved: what `saved_for_share` returned for the values.
            sizes: samples per micro-batch.

        Returns:
            The gradient of each micro-batch's value.
        """
        return [gradient] if len(sizes) == 1 else self._share(gradient, saved, sizes)

    def saved_for_share(self, parts: Sequence[Tensor]) -> Any:
        """What `share` needs of the values; saved between forward and backward."""
        return None

    @abstractmethod
    def _gather(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """`gather` for two or more micro-batches."""

    @abstractmethod
    def _share(self, gradient: Tensor, saved: Any, sizes: Sequence[int]) -> list[Tensor]:
        """`share` for two or more micro-batches."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Concatenate(Combine):
    """Concatenate the values along `dim`, the dimension that holds the samples."""

    dim: int
    name = "cat"
    copies = True

    def saved_for_share(self, parts: Sequence[Tensor]) -> list[int]:
        """The values' sizes along `dim`: a sample may have several entries."""
        return [p.shape[self.dim] for p in parts]

    def _gather(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return torch.cat(list(parts), self.dim)

    def _share(self, gradient: Tensor, saved: Any, sizes: Sequence[int]) -> list[Tensor]:
        return list(torch.split(gradient, saved, self.dim))


@dataclass(frozen=True)
class Sum(Combine):
    """Add the values up, in the order of the micro-batches."""

    name = "sum"
    is_reduction = True

    def _gather(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return _added(parts)

    def _share(self, gradient: Tensor, saved: Any, sizes: Sequence[int]) -> list[Tensor]:
        return [gradient] * len(sizes)


@dataclass(frozen=True)
class WeightedMean(Combine):
    """Average the values, weighted by the micro-batches' numbers of samples."""

    name = "mean"
    is_reduction = True

    def _gather(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        batch = sum(sizes)
        return _added([p * (n / batch) for p, n in zip(parts, sizes, strict=True)])

    def _share(self, gradient: Tensor, saved: Any, sizes: Sequence[int]) -> list[Tensor]:
        return _by_size(gradient, sizes)


@dataclass(frozen=True)
class Same(Combine):
    """Take the first value: it does not depend on the batch, so all are equal."""

    name = "same"

    def _gather(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return parts[0]

    def _share(self, gradient: Tensor, saved: Any, sizes: Sequence[int]) -> list[Tensor]:
        return _by_size(gradient, sizes)


def _added(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _by_size(gradient: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    batch = sum(sizes)
    return [gradient * (n / batch) for n in sizes]


SUM, MEAN, SAME = Sum(), WeightedMean(), Same()

REDUCTIONS: dict[str, Combine] = {c.name: c for c in (MEAN, SUM)}
"""The reductions by name: what ``out_reduce`` accepts."""
