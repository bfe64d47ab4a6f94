"""`CompiledPart`: a compiled part of a phase, and the arguments for which it is valid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from autopipe.passes.ir import all_hold

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import sympy
    from torch import Tensor

    from autopipe.passes.ir import Sizes
    from autopipe.passes.phases import TensorMeta


class ExpectedTensor(NamedTuple):
    """What compiled code was told of an argument.

    Attributes:
        shape: in elements.
        stride: in elements.
        dtype: of the elements.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class CompiledPart:
    """A compiled part of a phase.

    Attributes:
        call: takes the values of `symbols` and the tensors in a list, and empties it.
        symbols: the symbolic sizes that it takes.
        conditions: on the part's symbols, under which it is valid.
        arguments: metadata of the tensors.
    """

    call: Callable[[list[Any]], Sequence[Any]]
    symbols: tuple[sympy.Symbol, ...]
    conditions: tuple[sympy.Basic, ...]
    arguments: tuple[TensorMeta, ...]

    def holds_for(self, sizes: Sizes) -> bool:
        """Whether it is valid for some sizes."""
        return all_hold(self.conditions, sizes)

    def expected(self, sizes: Sizes) -> tuple[ExpectedTensor, ...]:
        """The tensors that it takes.

        Args:
            sizes: the values of the part's symbols.
        """
        found = (meta.at(sizes) for meta in self.arguments)
        return tuple(ExpectedTensor(m.shape, m.stride, m.dtype) for m in found)


def as_expected(tensors: list[Tensor], expected: Sequence[ExpectedTensor]) -> bool:
    """Make tensors what compiled code expects; it reads their memory unseen.

    Eager code takes any strides, so arguments may have others than those of the trace.

    Args:
        tensors: the arguments; one with other strides is replaced by a copy.
        expected: what the code was told of them.

    Returns:
        Whether shapes and dtypes are as expected. If not, the code must not run.
    """
    for i, (tensor, (shape, stride, dtype)) in enumerate(zip(tensors, expected, strict=True)):
        if tensor.dtype is not dtype or tensor.shape != shape:
            return False
        if tensor.stride() != stride and not _same_layout(tensor, stride):
            tensors[i] = torch.empty_strided(
                shape, stride, dtype=dtype, device=tensor.device
            ).copy_(tensor)
        elif tensor.is_neg():
            tensors[i] = tensor.resolve_neg()
    return True


def _same_layout(tensor: Tensor, stride: Sequence[int]) -> bool:
    """Whether strides differ only where they do not matter: in dimensions of one entry."""
    own = zip(tensor.shape, tensor.stride(), stride, strict=True)
    return all(n == 1 or a == b for n, a, b in own)
