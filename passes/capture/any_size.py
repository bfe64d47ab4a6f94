"""Functions of torch whose code in C++ makes numbers of symbolic sizes, in Python.

A number fixes a size: one capture would serve one batch size, or one length.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipe.passes.one_at_a_time import replaced

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@contextmanager
def keep_sizes_symbolic() -> Iterator[None]:
    """Let `torch.max_pool1d` and `take_along_dim` keep symbolic sizes, in this thread."""
    pool: Any = torch.max_pool1d
    take: Any = torch.take_along_dim

    def pooled(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (_max_pool1d if _is_symbolic(x.shape[-1:]) else pool)(x, *args, **kwargs)

    def taken(input: Tensor, indices: Tensor, dim: int | None = None, **kwargs: Any) -> Any:
        symbolic = _is_symbolic((*input.shape, *indices.shape))
        dims = range(-input.ndim, input.ndim) if input.ndim == indices.ndim else ()
        if dim is None or dim not in dims or not symbolic or kwargs:
            return take(input, indices, dim, **kwargs)
        return _take_along_dim(input, indices, dim)

    with ExitStack() as stack:
        stack.enter_context(replaced(torch, "max_pool1d", pooled))
        for owner in (torch, Tensor):
            stack.enter_context(replaced(owner, "take_along_dim", taken))
        yield


def _is_symbolic(sizes: Sequence[Any]) -> bool:
    return any(isinstance(n, torch.SymInt) for n in sizes)


def _max_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Pool a tensor with one more dimension, as torch does where gradients are needed."""

    def of_image(given: Any, other: int) -> list[int]:
        return [other, *(given if isinstance(given, (list, tuple)) else [given])]

    return torch.max_pool2d(
        input.unsqueeze(-2),
        of_image(kernel_size, 1),
        of_image(kernel_size if stride in (None, [], ()) else stride, 1),
        of_image(padding, 0),
        of_image(dilation, 1),
        ceil_mode,
    ).squeeze(-2)


def _take_along_dim(input: Tensor, indices: Tensor, dim: int) -> Tensor:
    dim %= input.ndim
    broadcast: Any = torch.broadcast_shapes

    def common(one: Tensor, other: Tensor) -> Tensor:
        """The first with the broadcast shape of both, but with its own size in `dim`."""
        sizes = [*other.shape[:dim], one.shape[dim], *other.shape[dim + 1 :]]
        return one.expand(broadcast(one.shape, sizes))

    return common(input, indices).gather(dim, common(indices, input))
