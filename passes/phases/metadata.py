"""Metadata of tensors that are traced, with sizes that are numbers or expressions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import sympy
import torch

from autopipe.passes.graph import full_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from autopipe.passes.ir import Sizes

Number = Any
"""A size or stride: an integer, or a sympy expression in `B` and the names of lengths."""


class TensorMeta(NamedTuple):
    """Metadata of a tensor of a micro-batch, as tracing needs it.

    Attributes:
        shape: sizes in elements; integers, or expressions in `B` and lengths.
        stride: in elements, likewise.
        dtype: of the elements.
        requires_grad: whether a gradient flows to it.
    """

    shape: tuple[Number, ...]
    stride: tuple[Number, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        """Read the metadata of a tensor."""
        shape = tuple(map(_number, tensor.shape))
        return cls(shape, tuple(map(_number, tensor.stride())), tensor.dtype, tensor.requires_grad)

    @property
    def is_symbolic(self) -> bool:
        """Whether a size depends on a symbol."""
        return any(isinstance(n, sympy.Basic) for n in self.shape)

    def at(self, sizes: Sizes) -> TensorMeta:
        """Return the metadata for some sizes."""
        return self._replace(
            shape=tuple(number_at(n, sizes) for n in self.shape),
            stride=tuple(number_at(n, sizes) for n in self.stride),
        )

    def with_shape(self, shape: Sequence[sympy.Expr], sizes: Sizes) -> TensorMeta | None:
        """Return this metadata of an example for all sizes.

        Args:
            shape: in symbols.
            sizes: the example: the values of the symbols.

        Returns:
            It; None if the example has another shape, or gaps in memory: then its strides do not
            follow from its shape. Dimensions may be expanded.
        """
        numbers = tuple(int(n) if n.is_Integer else n for n in shape)
        stored = tuple(n if step else 1 for n, step in zip(numbers, self.stride, strict=True))
        dense = self._replace(shape=stored).dense_as(self.stride, sizes).stride
        stride = tuple(n if step else 0 for n, step in zip(dense, self.stride, strict=True))
        found = self._replace(shape=numbers, stride=stride)
        return found if found.at(sizes) == self else None

    def dense_as(self, stride: Sequence[int], sizes: Sizes) -> TensorMeta:
        """Return the metadata of a dense tensor whose dimensions are in some order in memory.

        Args:
            stride: integers that tell the order.
            sizes: an example, for which `stride` is that of a dense tensor.
        """
        if not self.is_symbolic:
            return self._replace(stride=tuple(stride))
        shape = self.at(sizes).shape
        strides: list[Number] = [1] * len(shape)
        step: Number = 1
        for d in sorted(range(len(shape)), key=lambda d: (stride[d], shape[d], -d)):
            strides[d] = step
            step = step * self.shape[d]
        return self._replace(stride=tuple(strides))

    def after_copy(self, sizes: Sizes) -> TensorMeta:
        """Return the metadata of a copy: dense strides in the same order of dimensions.

        Args:
            sizes: an example, if sizes are expressions.
        """
        known = self.at(sizes)
        meta = torch.empty_strided(known.shape, known.stride, dtype=self.dtype, device="meta")
        return self.dense_as(meta.clone().stride(), sizes)

    def contiguous(self, sizes: Sizes) -> TensorMeta:
        """Return the metadata of a contiguous tensor of this shape, without a gradient.

        Args:
            sizes: an example, if sizes are expressions.
        """
        stride = torch.empty(self.at(sizes).shape, device="meta").stride()
        return self.dense_as(stride, sizes)._replace(requires_grad=False)


def number_at(number: Number, sizes: Sizes) -> int:
    """Evaluate a size or stride."""
    return number if isinstance(number, int) else int(number.xreplace(_integers(sizes)))


def _integers(sizes: Sizes) -> dict[Any, sympy.Integer]:
    return {symbol: sympy.Integer(n) for symbol, n in sizes.items()}


def _number(value: Any) -> Number:
    expr = full_size(value)
    return int(expr) if expr.is_Integer else expr
