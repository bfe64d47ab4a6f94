"""Captured → Annotated: what every node costs, as expressions in the batch size `B`.

FLOPs come from torch's own formulas (`torch.utils.flop_counter`), which also takes composite
operators (linear, attention) apart; what it has no formula for (element-wise work) counts no FLOPs,
as in torch. Bytes moved are one read of every argument and one write of every result; views move
nothing.

Identical calls (operator, sizes, dtypes) are costed once: a model's layers repeat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ._torch import FlopCounterMode, OpOverload, flop_registry, storage_id
from .graphs import is_size, size, tensors_of
from .ir import Annotated, B, Captured, NodeCost, at_batch

if TYPE_CHECKING:
    from collections.abc import Hashable

FREE = NodeCost(sympy.Integer(0), sympy.Integer(0), sympy.Integer(0))

SECONDS_PER_FLOP = 1 / 50e9
SECONDS_PER_BYTE = 1 / 10e9
"""A rough device (one CPU core; a GPU has much the same ratio of 1:200 in fp32) that turns FLOPs
and bytes into one figure to balance by. Only ratios between nodes matter for the cut."""

BACKWARD_FACTOR = 3
"""Forward and backward together, in forwards: the backward of a product is two products."""


def annotate(captured: Captured) -> Annotated:
    """Cost every call of a captured graph.

    Returns:
        `Annotated` with FLOPs, bytes moved and activation bytes per node, each a sympy expression
        whose only symbol is `B`.
    """
    known: dict[Hashable, NodeCost] = {}
    costs: dict[str, NodeCost] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        if not isinstance(node.target, OpOverload) or is_size(node):
            costs[node.name] = FREE
            continue
        key = (node.target, _looks(node.args), _looks(node.kwargs))
        if key not in known:
            known[key] = _cost(node)
        costs[node.name] = known[key]
    annotated = Annotated(captured, costs)
    annotated.verify()
    return annotated


def seconds(cost: NodeCost, batch: int) -> float:
    """Estimated time of forward and backward at one batch size, in seconds of a rough device."""
    flops, moved = (float(e.subs(B, batch)) for e in (cost.flops, cost.moved_bytes))
    return BACKWARD_FACTOR * (flops * SECONDS_PER_FLOP + moved * SECONDS_PER_BYTE)


def _looks(value: Any) -> Hashable:
    """A hashable summary of arguments: tensors by size and dtype, the rest as it is."""
    if isinstance(value, fx.Node):
        if is_size(value):
            return str(size(value.meta["val"]))
        return tuple((str(t.shape), str(t.stride()), t.dtype) for t in tensors_of(value))
    if isinstance(value, (tuple, list)):
        return tuple(map(_looks, value))
    if isinstance(value, dict):
        return tuple((k, _looks(v)) for k, v in value.items())
    return str(value)


def _bytes(tensor: Tensor) -> sympy.Expr:
    return sympy.Mul(*map(size, tensor.shape)) * tensor.dtype.itemsize


def _cost(node: fx.Node) -> NodeCost:
    sources = [t for n in node.all_input_nodes for t in tensors_of(n)]
    owned = {storage_id(t) for t in sources}
    results = tensors_of(node)
    new = [t for t in results if storage_id(t) not in owned]
    schema = node.target._schema  # type: ignore[union-attr]
    if not new and not schema.is_mutable:
        return FREE  # a view
    activation = sum((_bytes(t) for t in new), sympy.Integer(0))
    moved = sum((_bytes(t) for t in sources + results), sympy.Integer(0))
    return NodeCost(_flops(node), moved, activation)


PROBES = (2, 3, 5)
"""FLOPs are polynomials in the batch size, of degree two at most: three points determine them."""


def _flops(node: fx.Node) -> sympy.Expr:
    """FLOPs by torch's counter, on meta tensors at three batch sizes.

    (Running on the graph's own symbolic fakes would add guards to their shape environment: an
    upsample there fixes the batch size for good.)
    """
    target: Any = node.target
    operands = sum(t.is_floating_point() for n in node.all_input_nodes for t in tensors_of(n))
    composite = target.has_kernel_for_dispatch_key("CompositeImplicitAutograd")
    if target.overloadpacket not in flop_registry and not (composite and operands > 1):
        return sympy.Integer(0)  # element-wise work counts none; a product needs two operands
    points = [(batch, _flops_at(node, batch)) for batch in PROBES]
    if len({flops for _, flops in points}) == 1:
        return sympy.Integer(points[0][1])
    return sympy.interpolate(points, B)


def _flops_at(node: fx.Node, batch: int) -> int:
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _stand_in(n, batch))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        target(*args, **kwargs)
    return int(counter.get_total_flops())


def _stand_in(node: fx.Node, batch: int) -> Any:
    """What `node` makes, at one batch size, as meta tensors."""

    def concrete(value: Any) -> Any:
        if isinstance(value, Tensor):
            shape = [at_batch(size(s), batch) for s in value.shape]
            return torch.empty(shape, dtype=value.dtype, device="meta")
        return at_batch(size(value), batch) if isinstance(value, torch.SymInt) else value

    return pytree.tree_map(concrete, node.meta["val"])
