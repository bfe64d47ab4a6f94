"""How a value depends on the batch: the states that `propagate_states` finds for every node.

Micro-batches give the whole batch's result if each sample's part of a value depends on that sample
alone. Every value is in one of these states:

    Static   it does not depend on the batch
    Samples  one dimension holds the samples, each computed independently of the others
    Reduced  a sum, a mean or another reduction over all samples; no batch dimension is left
    Mixed    samples were combined in a way for which micro-batches give, or may give, another value
    Size     a number computed from shapes
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import sympy
from torch import fx

from autopipe.passes.ir import B

if TYPE_CHECKING:
    from autopipe.passes.ir import Combine

    from .partial_reductions import PartialReduction

Shape: TypeAlias = "tuple[sympy.Expr, ...]"


@dataclass(frozen=True)
class Static:
    """Independent of the batch."""


@dataclass(frozen=True)
class Size:
    """A number computed from shapes: the same for all samples, but not for all micro-batches."""


@dataclass(frozen=True)
class Samples:
    """Dimension `dim` holds the samples.

    Its size is ``batches * B * per_sample``; unfolded to ``(batches, B, per_sample)``, sample b is
    at ``[:, b, :]``. ``(B, T, C)`` flattened to ``(B*T, C)`` has per_sample = T; two batches
    concatenated by `torch.cat` have batches = 2.

    Attributes:
        dim: the dimension.
        batches: number of whole batches that follow one another in the dimension.
        per_sample: entries of each sample in each batch.
        index_step: the values are ``index_step * b``, the first index of sample b in a dimension
            with ``per_sample = index_step``. They may only index that dimension, as in
            ``x[torch.arange(B), i]``.
        uniform: all samples have equal entries, as in zeros or after `expand`.
    """

    dim: int
    batches: int = 1
    per_sample: int = 1
    index_step: int | None = None
    uniform: bool = False

    def with_dim(self, dim: int) -> Samples:
        """The same with the samples in another dimension."""
        return replace(self, dim=dim)


@dataclass(frozen=True)
class Reduced:
    """A reduction over all samples, or a value computed from one.

    Attributes:
        how: the rule that combines the micro-batches' values, or the partial sums from which the
            batch's value is computed; None if there is no rule, or if the value is computed from
            another reduction.
    """

    how: Combine | PartialReduction | None = None


@dataclass(frozen=True)
class Mixed:
    """A sample's value depends on other samples.

    Attributes:
        node: the op that mixed them.
        reason: for the error message.
        proven: micro-batches certainly change the value. If False, only a trial can decide, for
            example where tokens are sorted by expert and later sorted back.
    """

    node: fx.Node
    reason: str
    proven: bool = True


State: TypeAlias = "Static | Size | Samples | Reduced | Mixed"

STATIC, SIZE, REDUCED = Static(), Size(), Reduced()

COUNT_AS_VALUE = "the number of samples is used as a value"


def batch_dims(shape: Shape) -> list[int]:
    """The dimensions whose size depends on the batch size."""
    return [d for d, s in enumerate(shape) if s.free_symbols]


def batch_multiple(size_: sympy.Expr) -> int | None:
    """The integer k of a size k·B; None for other sizes."""
    quotient = size_ / B
    return int(quotient) if quotient.is_Integer else None


def fits_shape(state: State, shape: Shape) -> bool:
    """Whether a tensor of this shape can be in this state."""
    dims = batch_dims(shape)
    if isinstance(state, Samples):
        return dims == [state.dim] and shape[state.dim] == state.batches * B * state.per_sample
    return isinstance(state, Mixed) or not dims
