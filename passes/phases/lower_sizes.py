"""Replace the arithmetic on sizes in a joint graph by expressions.

A trace computes sizes by ops: it reads them off shapes, and multiplies them. A stage's program gets
the sizes of its micro-batch instead, and writes each expression where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.passes._torch import size_text
from autopipe.passes.graph import SizeExpression, full_size, is_size

if TYPE_CHECKING:
    from collections.abc import Mapping


def lower_sizes(graph: fx.Graph) -> None:
    """Replace every number that a graph computes from sizes.

    Args:
        graph: a joint graph; changed in place.

    Raises:
        NotImplementedError: a number is computed by a function that programs do not call.
    """
    numbers: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "call_function" and is_size(node):
            numbers[node] = _number(node.meta["val"])
        elif numbers and node.op != "placeholder":
            node.args = _replaced(node.args, numbers)
            node.kwargs = _replaced(node.kwargs, numbers)
    for node in reversed(numbers):
        if not node.users:
            graph.erase_node(node)


def _number(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return value
    expr = full_size(value)
    if not expr.free_symbols:
        return SizeExpression(expr).at({})
    if not isinstance(value, torch.SymInt):
        size_text(expr)  # raises if it cannot be written
    return SizeExpression(expr)


def _replaced(arguments: Any, numbers: Mapping[fx.Node, Any]) -> Any:
    return fx.map_arg(arguments, lambda n: numbers.get(n, n))
