"""Sizes as expressions: in the batch size `B`, and in lengths, the other sizes that may change.

A tracer gives each dimension that may change a symbol of its own. `name_sizes` tells which of them
are the batch size, and which are lengths. Most passes only ask how a size depends on the batch:
`symbolic_size` answers in `B`, with lengths as in the example that was captured. What runs later
needs `full_size`, in `B` and lengths.
"""

from __future__ import annotations

import operator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import Tensor, fx

from autopipe.passes._torch import ShapeEnv, emit_expression
from autopipe.passes.ir import B, TensorSpec
from autopipe.passes.one_at_a_time import one_at_a_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from autopipe.passes.ir import Sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class SizeExpression:
    """A number that is computed from sizes, as an argument of an op.

    Attributes:
        expr: in `B` and the names of lengths.
    """

    expr: sympy.Expr

    def at(self, sizes: Sizes) -> Any:
        """Evaluate it."""
        value = self.expr.xreplace({s: sympy.Integer(n) for s, n in sizes.items()})
        if value in (sympy.true, sympy.false):
            return bool(value)
        return int(value) if value.is_Integer else float(value)


class SizeNames(NamedTuple):
    """What the symbols of one trace mean.

    Attributes:
        names: symbol of the trace → `B`, or the name of a length.
        examples: name of a length → its value in the example.
    """

    names: Mapping[sympy.Basic, sympy.Symbol]
    examples: Mapping[sympy.Symbol, int]


_names: WeakKeyDictionary[ShapeEnv, SizeNames] = WeakKeyDictionary()


def name_sizes(environment: ShapeEnv, names: SizeNames) -> None:
    """Say what the symbols of a trace mean. Those that have no name are the batch size."""
    _names[environment] = names


def full_size(value: Any) -> sympy.Expr:
    """Return a size as an expression in `B` and the names of lengths."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return in_named_sizes(value.node.expr, value.node.shape_env)
    return sympy.Integer(int(value))


def symbolic_size(value: Any) -> sympy.Expr:
    """Return a size as an expression in `B`, with lengths as in the example."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        found = _names.get(value.node.shape_env)
        expr = in_named_sizes(value.node.expr, value.node.shape_env)
        return expr.xreplace(found.examples) if found is not None and found.examples else expr
    return sympy.Integer(int(value))


def in_named_sizes(expr: Any, environment: ShapeEnv | None) -> Any:
    """Replace the symbols of an expression by their names.

    Args:
        expr: an expression or a condition.
        environment: of the trace.
    """
    found = _names.get(environment) if environment is not None else None
    names = found.names if found is not None else {}
    return sympy.sympify(expr).xreplace({s: names.get(s, B) for s in expr.free_symbols})


def tensor_spec(node: fx.Node) -> TensorSpec:
    """Return the metadata of a node's tensor."""
    value = node.meta["val"]
    shape, full_shape = (tuple(map(f, value.shape)) for f in (symbolic_size, full_size))
    return TensorSpec(node.name, shape, value.dtype, None if shape == full_shape else full_shape)


@contextmanager
def example_lengths(graph: fx.Graph, lengths: Sizes) -> Iterator[None]:
    """Meanwhile, `symbolic_size` gives sizes with other lengths than those of the example.

    Args:
        graph: all sizes of its trace are meant.
        lengths: the value of each.
    """
    tensors = (n.meta["val"] for n in graph.nodes if n.op == "placeholder")
    sizes = (s for t in tensors for s in t.shape if isinstance(s, torch.SymInt))
    environment = next(s.node.shape_env for s in sizes)
    found = _names[environment]
    values = {symbol: sympy.Integer(n) for symbol, n in lengths.items()}
    with one_at_a_time():
        _names[environment] = found._replace(examples=values)
        try:
            yield
        finally:
            _names[environment] = found


def size_symbols(value: Any) -> set[Any]:
    """The symbols that a size depends on: `B`, names of lengths."""
    return set(full_size(value).free_symbols)


def readable_symbols(tensor: Tensor) -> set[Any]:
    """The symbols whose values can be read off a tensor's shape."""
    sizes = [full_size(n) for n in tensor.shape]
    return {s for size in sizes for s in size.free_symbols if (size / s).is_Integer}


def emit_symbol(
    graph: fx.Graph, symbol: sympy.Symbol, candidates: Iterable[tuple[fx.Node, Tensor]]
) -> fx.Node:
    """Append ops that read a symbol's value off the shape of a tensor.

    Args:
        graph: the graph.
        symbol: `B` or the name of a length.
        candidates: nodes with their fake tensors; a dimension equal to the symbol is preferred to a
            multiple.

    Returns:
        The node whose value is the symbol's.

    Raises:
        LookupError: it cannot be read off any candidate's shape.
    """
    multiples = []
    for node, tensor in candidates:
        for dim, expr in enumerate(map(full_size, tensor.shape)):
            if expr == symbol:
                return graph.call_function(aten.sym_size.int, (node, dim))
            if symbol in expr.free_symbols and (expr / symbol).is_Integer:
                multiples.append((node, dim, int(expr / symbol)))
    if not multiples:
        raise LookupError(f"no shape tells {symbol}")
    node, dim, factor = multiples[0]
    multiple = graph.call_function(aten.sym_size.int, (node, dim))
    return graph.call_function(operator.floordiv, (multiple, factor))


def emit_size(value: Any, symbol: Callable[[sympy.Symbol], fx.Node]) -> fx.Node | int:
    """Return a size as an integer, or append ops that compute it.

    Args:
        value: the size, maybe symbolic.
        symbol: returns the node whose value is a symbol's; only called for those that are needed.
    """
    expr = full_size(value)
    if expr.is_Integer:
        return int(expr)
    return emit_expression(expr, {s: symbol(s) for s in sorted(expr.free_symbols, key=str)})


def add_size(graph: fx.Graph, target: Callable[..., Any], /, *args: Any) -> fx.Node:
    """Append a computation on sizes, with its value."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node


def add_product(graph: fx.Graph, tensor: fx.Node, dims: Sequence[int]) -> fx.Node | int:
    """Append the product of some sizes of a tensor; an integer if none of them may change.

    Args:
        graph: the graph.
        tensor: the tensor.
        dims: positions of the sizes.
    """
    product: Any = 1
    for dim in dims:
        size = tensor.meta["val"].shape[dim]
        factor = add_size(graph, aten.sym_size.int, tensor, dim) if size_symbols(size) else size
        known = isinstance(product, int) and isinstance(factor, int)
        product = product * factor if known else add_size(graph, operator.mul, product, factor)
    found: fx.Node | int = product
    return found
