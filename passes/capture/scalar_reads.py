"""Python numbers that are read from tensors: ``loss.sum() / mask.sum().item()``.

torch.export represents such a number by a symbol. Here it becomes a tensor of one entry without a
gradient, and so does everything computed from it. Like any other value, it can then be summed over
micro-batches or used in the epilogue. Where a Python number is required, such as a size, the model
is refused.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.errors import CaptureError
from autopipe.passes._torch import OpOverload, free_unbacked_symbols
from autopipe.passes.graph import add_call, is_integer, is_size, source_line, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

aten = torch.ops.aten

READS = (aten.item.default, aten._local_scalar_dense.default)


def scalars_to_tensors(graph: fx.Graph) -> None:
    """Turn the numbers that a graph reads from tensors into tensors.

    Args:
        graph: normalized; is changed.

    Raises:
        CaptureError: a shape, or something else that must be a number, depends on tensor values.
    """
    tensors: dict[fx.Node, fx.Node] = {}  # number → tensor
    for node in list(graph.nodes):
        numbers = [n for n in node.all_input_nodes if n in tensors]
        if node.op != "call_function" or (node.target not in READS and not numbers):
            continue
        with graph.inserting_before(node):
            if node.target in READS:
                tensors[node] = _read_tensor(graph, node.all_input_nodes[0])
            elif is_size(node):
                tensors[node] = _tensor_arithmetic(graph, node, tensors)
            elif node.target in FILLED:
                _fill(graph, node, tensors)
            else:
                node.target = _tensor_overload(node, tensors)
                kept = [n for n in node.all_input_nodes if n not in tensors]
                others = [t for n in kept for t in tensors_of(n)]
                for n in numbers:
                    node.replace_input_with(n, _of_operands_type(graph, others, tensors[n]))
    for node in reversed(list(tensors)):
        if not node.users:
            graph.erase_node(node)
    for node in graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise _error(node)


def _read_tensor(graph: fx.Graph, source: fx.Node) -> fx.Node:
    """The tensor for ``source.item()``, in double precision like a Python number."""
    value = source.meta["val"]
    dtype = torch.float64 if value.is_floating_point() else torch.int64
    plain = value.shape == () and value.dtype == dtype and not value.requires_grad
    if plain and source.op == "placeholder":
        return source
    flat = add_call(graph, aten.reshape.default, source, [])
    return add_call(graph, aten.to.dtype, add_call(graph, aten.detach.default, flat), dtype)


def _of_operands_type(graph: fx.Graph, others: Sequence[Tensor], number: fx.Node) -> fx.Node:
    """The tensor for a number, in a dtype with which an op's result has the dtype that it had.

    A Python number never widens the dtype of a tensor: float32 stays float32. A tensor of one entry
    in double precision does so if the other operands have no dimensions, or are integers. If it
    does not, it is left as it is, so that the op rounds it like a number.
    """
    if not others:
        return number
    own = number.meta["val"]
    common = functools.reduce(torch.promote_types, (t.dtype for t in others))
    wanted = torch.result_type(torch.empty((), dtype=common), 1.0 if own.is_floating_point() else 1)
    ranked = torch.empty((1,) if any(t.ndim for t in others) else (), dtype=common)
    if torch.result_type(ranked, torch.empty((), dtype=own.dtype)) == wanted:
        return number
    return add_call(graph, aten.to.dtype, number, wanted)


def _tensor_arithmetic(
    graph: fx.Graph, node: fx.Node, tensors: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """Arithmetic on numbers, of which at least one has become a tensor."""
    args = [tensors.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
    tensor_first = isinstance(args[0], fx.Node) and not is_size(args[0])
    rule = (ARITHMETIC if tensor_first else REVERSED).get(node.target)
    if rule is None or node.kwargs:
        raise _error(node)

    def call(target: Any, *operands: Any) -> fx.Node:
        return add_call(graph, target, *operands)

    if isinstance(node.meta["val"], (float, torch.SymFloat)):
        args = [_double(call, a) if isinstance(a, fx.Node) and is_integer(a) else a for a in args]
    result: fx.Node = rule(call, *args)
    return result


def _double(call: Callable[..., fx.Node], x: Any) -> Any:
    return call(aten.to.dtype, x, torch.float64)


def _power(exponent: Any) -> Any:
    numbers = isinstance(exponent, fx.Node) and not is_size(exponent)
    return aten.pow.Tensor_Tensor if numbers else aten.pow.Tensor_Scalar


def _larger(call: Callable[..., fx.Node], x: Any, y: Any, *, of: Any, bound: str) -> fx.Node:
    if isinstance(y, fx.Node) and not is_size(y):
        return call(of, x, y)
    return call(getattr(aten, f"clamp_{bound}").default, x, y)


ARITHMETIC: dict[Any, Any] = {
    operator.add: lambda call, x, y: call(aten.add.Tensor, x, y),
    operator.sub: lambda call, x, y: call(aten.sub.Tensor, x, y),
    operator.mul: lambda call, x, y: call(aten.mul.Tensor, x, y),
    operator.truediv: lambda call, x, y: call(aten.div.Tensor, _double(call, x), y),
    operator.neg: lambda call, x: call(aten.neg.default, x),
    operator.pow: lambda call, x, y: call(_power(y), x, y),
    torch.sym_float: _double,
    torch.sym_max: lambda call, x, y: _larger(call, x, y, of=aten.maximum.default, bound="min"),
    torch.sym_min: lambda call, x, y: _larger(call, x, y, of=aten.minimum.default, bound="max"),
}
"""Operations on numbers → ops on tensors, for a first operand that is a tensor."""

REVERSED: dict[Any, Any] = {
    operator.add: lambda call, y, x: call(aten.add.Tensor, x, y),
    operator.sub: lambda call, y, x: call(aten.add.Tensor, call(aten.neg.default, x), y),
    operator.mul: lambda call, y, x: call(aten.mul.Tensor, x, y),
    operator.truediv: lambda call, y, x: call(
        aten.div.Tensor, call(aten.full_like.default, _double(call, x), y), _double(call, x)
    ),
    operator.pow: lambda call, y, x: call(aten.pow.Scalar, y, x),
    torch.sym_max: lambda call, y, x: call(aten.clamp_min.default, x, y),
    torch.sym_min: lambda call, y, x: call(aten.clamp_max.default, x, y),
}
"""The same for a first operand that is a number and a second that is a tensor."""


FILLED = (
    *(aten.full.default, aten.full_like.default, aten.new_full.default),
    aten.scalar_tensor.default,
)
"""Ops that create a tensor of one value. No overload of theirs takes a tensor for it."""


def _fill(graph: fx.Graph, node: fx.Node, tensors: Mapping[fx.Node, fx.Node]) -> None:
    """Create a tensor of zeros, and fill it with a number that has become a tensor."""
    number = next(n for n in node.all_input_nodes if n in tensors)
    users, dtype = list(node.users), node.meta["val"].dtype
    node.args = tuple(0 if a is number else a for a in node.args)
    node.kwargs = {k: 0 if a is number else a for k, a in node.kwargs.items()} | {"dtype": dtype}
    if any(n in tensors for n in node.all_input_nodes):  # a size
        raise _error(node)
    with graph.inserting_after(node):
        filled = add_call(graph, aten.fill.Tensor, node, tensors[number])
    for user in users:
        user.replace_input_with(node, filled)


def _tensor_overload(node: fx.Node, tensors: Mapping[fx.Node, fx.Node]) -> Any:
    """The overload of a node's op that takes tensors instead of these numbers."""
    target: Any = node.target
    if not isinstance(target, OpOverload):
        raise _error(node)
    own = [a.name for a in target._schema.arguments]
    given = {**dict(zip(own, node.args, strict=False)), **node.kwargs}
    positions = {name for name, a in given.items() if isinstance(a, fx.Node) and a in tensors}
    constants = {name for name, a in given.items() if isinstance(a, (int, float))}
    listed = [n for n in node.all_input_nodes if n in tensors]
    if len(listed) <= len(positions):  # none is inside a list, such as a size
        packet = target.overloadpacket
        for overload in [target, *(getattr(packet, n) for n in packet.overloads())]:
            arguments = {a.name: str(a.type) for a in overload._schema.arguments}
            takes = {name for name, kind in arguments.items() if "Tensor" in kind}
            if list(arguments) == own and positions <= takes and not takes & constants:
                return overload
    raise _error(node)


def _error(node: fx.Node) -> CaptureError:
    return CaptureError(
        "a number or a shape that depends on the values of tensors cannot be pipelined",
        node=node.name,
        source=source_line(node),
        found=str(node.target),
        remedy="keep a tensor of one entry (no .item()), keep the shape and mask instead"
        " (torch.where(mask, x, 0) for x[mask]), or pass the number in",
    )
