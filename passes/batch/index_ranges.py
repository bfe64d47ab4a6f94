"""Which operands of an op are indices, and how large a dimension they index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.passes.graph import symbolic_size, tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

aten = torch.ops.aten

TABLES: dict[Any, tuple[str, str, int | str]] = {
    aten.embedding: ("weight", "indices", 0),
    aten.gather: ("self", "index", "dim"),
    aten.take_along_dim: ("self", "indices", "dim"),
    aten.index_select: ("self", "index", "dim"),
    aten.index: ("self", "indices", 0),
    aten._unsafe_index: ("self", "indices", 0),
    aten.index_put: ("self", "indices", 0),
    aten.index_put_: ("self", "indices", 0),
} | {
    getattr(aten, name + suffix): ("self", "index", "dim")
    for name in (
        *("scatter", "scatter_add", "scatter_reduce"),
        *("index_add", "index_copy", "index_fill"),
    )
    for suffix in ("", "_")
}
"""Operator → argument that is indexed, argument with the indices, dimension that they index.

A list of indices starts at that dimension, with one index per dimension."""

ORDERS = (aten.sort, aten.argsort, aten.topk, aten.one_hot, aten.repeat_interleave)
"""Further operators whose results are other samples' places, or need integers in a range."""


def is_index(node: fx.Node, source: fx.Node) -> bool:
    """Whether an op uses `source` as an index, or to find places."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in ORDERS:
        return True
    return any(index is source for _, index, _ in _of_node(node))


def indexed_sizes(node: fx.Node, source: fx.Node) -> list[Any]:
    """The sizes, as expressions in `B`, of the dimensions that `source` indexes in an op."""
    sizes = []
    for table, index, dim in _of_node(node):
        if index is source:
            shape = tensors_of(table)[0].shape
            sizes.append(symbolic_size(shape[dim % len(shape)]) if len(shape) else 1)
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.one_hot and len(node.args) > 1 and isinstance(node.args[1], int):
        sizes += [node.args[1]] if node.args[1] != -1 else []
    return sizes


def check_indices(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that all indices of an op are within their dimension.

    A CUDA kernel does not raise an error for such an index: it makes the process's device unusable.

    Raises:
        IndexError: one is not.
    """
    packet = getattr(target, "overloadpacket", None)
    if packet is aten.one_hot and len(args) > 1 and args[0].numel():
        low, high = (int(x) for x in args[0].aminmax())
        if low < 0 or 0 <= args[1] <= high:
            raise IndexError(f"a class of {low} … {high} among {args[1]}")
    for table, index, dim in _triples(target, args, kwargs):
        if not isinstance(index, Tensor) or index.dtype is torch.bool or not index.numel():
            continue
        size = table.shape[dim] if table.dim() else 1
        least = 0 if target.overloadpacket is aten.embedding else -size
        low, high = (int(x) for x in index.aminmax())
        if low < least or high >= size:
            raise IndexError(f"an index of {low} … {high} in a dimension of {size}")


def _of_node(node: fx.Node) -> Iterator[tuple[fx.Node, Any, int]]:
    return _triples(node.target, node.args, node.kwargs)


def _triples(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Any, Any, int]]:
    """(indexed, index, dimension) of an op, on nodes or on tensors."""
    names = TABLES.get(getattr(target, "overloadpacket", None))
    if names is None:
        return
    of = dict(zip((a.name for a in target._schema.arguments), args, strict=False)) | {**kwargs}
    table, index, dim = of.get(names[0]), of.get(names[1]), names[2]
    at = of.get(dim) if isinstance(dim, str) else dim
    if table is None or not isinstance(at, int):
        return
    for n, one in enumerate(index if isinstance(index, (list, tuple)) else [index]):
        if one is not None:
            yield table, one, at + n
