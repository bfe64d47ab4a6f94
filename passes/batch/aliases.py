"""Results that share memory with an input, a buffer or another result.

The model's own result ``h, h[:, 0]`` is one memory: what is written to one is seen in the other. So
such a result is no output of the graph. It is viewed anew, once a step, from what it shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from autopipe.passes._torch import storage_id_of
from autopipe.passes.graph import is_size, symbolic_size
from autopipe.passes.ir import B

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

aten = torch.ops.aten

VIEWS = {
    *(aten.alias, aten.detach, aten.view, aten.view_as, aten.reshape, aten.reshape_as, aten.ravel),
    *(aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.contiguous, aten.to),
    *(aten.t, aten.transpose, aten.permute, aten.movedim, aten.moveaxis, aten.swapaxes),
    *(aten.swapdims, aten.numpy_T, aten.mT, aten.select, aten.slice, aten.narrow, aten.diagonal),
    *(aten.expand, aten.expand_as),
}
"""Operators that return a view of their first argument; some only where nothing is to be copied."""

LIKE_ANOTHER = {
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}
"""Views in the shape of another tensor → the operator that takes the shape itself."""


@dataclass(frozen=True)
class _BatchSize:
    """A size, as an expression in the batch size."""

    expr: Any


@dataclass(frozen=True)
class Replay:
    """Views of a tensor, one after another; called with the tensor and the batch size.

    Attributes:
        steps: per view, the operator, its arguments but the first, and its keyword arguments.
    """

    steps: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]

    def __call__(self, tensor: Tensor, batch: int) -> Tensor:
        def size(value: Any) -> Any:
            return int(value.expr.subs(B, batch)) if isinstance(value, _BatchSize) else value

        for target, args, kwargs in self.steps:
            found_args, found_kwargs = map_aggregate((args, kwargs), size)
            tensor = target(tensor, *found_args, **found_kwargs)
        return tensor


def view_of(
    node: fx.Node, bases: Container[fx.Node], buffer_of: Mapping[fx.Node, fx.Node]
) -> tuple[fx.Node, Replay] | None:
    """Find what a node is a view of.

    Args:
        node: a result.
        bases: nodes that other results are, or are filled from.
        buffer_of: new value of a written buffer → the buffer, whose memory its views have.

    Returns:
        The first of `bases` that it views, and how; None if it views none, or in another way.
    """
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    while node not in bases or not steps:
        target: Any = node.target
        if node.op != "call_function" or getattr(target, "overloadpacket", None) not in VIEWS:
            return None
        source, *others = node.args
        if not isinstance(source, fx.Node):
            return None
        memory = {storage_id_of(source), storage_id_of(buffer_of.get(source, source))}
        if storage_id_of(node) not in memory:
            return None
        shape = node.meta["val"].shape
        rest: Any = fx.map_arg((tuple(others), dict(node.kwargs)), _size)
        if target in LIKE_ANOTHER:
            target, rest = (
                LIKE_ANOTHER[target],
                (([_BatchSize(symbolic_size(n)) for n in shape],), {}),
            )
        elif _holds_nodes(rest):
            return None
        steps.append((target, *rest))
        node = source
    return node, Replay(tuple(reversed(steps)))


def _size(node: fx.Node) -> Any:
    return _BatchSize(symbolic_size(node.meta["val"])) if is_size(node) else node


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)
