"""Checks that a graph with numbers among its inputs is that of the model with these numbers.

In a trace such a number has no value, and not its type: ``isinstance(beta, float)`` is false, and
``type(n) is int``, ``a is b``. So the model is traced once more with the numbers themselves. Both
graphs must have the same ops on the same values, and the same result.

The arithmetic of tensors is Python's only within limits, which become guards.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from autopipe.errors import CaptureError
from autopipe.passes._torch import OpOverload
from autopipe.passes.graph import source_line

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from .flat_module import ForwardResult

DIVISIONS = operator.truediv, operator.floordiv, operator.mod
SYMBOLIC = torch.SymInt, torch.SymFloat, torch.SymBool


class _Call(NamedTuple):
    """An op of a graph.

    Attributes:
        node: the op.
        text: its name, and its arguments without their numbers.
        numbers: these, in order.
    """

    node: fx.Node
    text: str
    numbers: list[float]

    def agrees(self, other: _Call) -> bool:
        """Whether another graph's op does the same, numbers up to rounding."""
        pairs = zip(self.numbers, other.numbers, strict=True)
        return self.text == other.text and all(
            a == b or math.isclose(a, b, rel_tol=1e-9) for a, b in pairs
        )


def check_same_ops(
    program: torch.export.ExportedProgram,
    with_values: torch.export.ExportedProgram,
    values: Mapping[sympy.Symbol, float],
) -> None:
    """Check that a model computes with its numbers, and does nothing else with them.

    Args:
        program: the model, traced with numbers that have no value.
        with_values: traced with their values.
        values: of the symbols in `program` that stand for numbers.

    Raises:
        CaptureError: the graphs differ.
    """
    calls, wanted = _calls(program, values), _calls(with_values, {})
    for call, other in zip(calls, wanted, strict=False):
        if not call.agrees(other):
            raise _error(str(other.node.target), source_line(other.node))
    constants = [*program.constants.values()], [*with_values.constants.values()]
    if len(calls) != len(wanted) or not all(map(_is_same, *constants)):
        raise _error("other ops", None)


def check_same_result(result: ForwardResult, with_values: ForwardResult) -> None:
    """Check that a result has the same structure and the same texts.

    Args:
        result: of the model, traced with numbers that have no value.
        with_values: traced with their values.

    Raises:
        CaptureError: they differ, as a text or the key of a dict that tells a number does.
    """
    texts, wanted = (
        [r.spec, *(x for x in r.leaves if isinstance(x, str))] for r in (result, with_values)
    )
    if texts != wanted:
        raise _error(f"a text of the result: {wanted[1:] or wanted[0]}", None)


def arithmetic_limits(
    program: torch.export.ExportedProgram, symbols: Collection[sympy.Symbol]
) -> Iterator[sympy.Basic]:
    """The conditions under which tensors compute with numbers what Python does.

    Python raises errors where a tensor has inf, and its integers have any size.

    Args:
        program: traced with numbers that have no value.
        symbols: for these.
    """
    for node in program.graph.nodes:
        expr = _expression(node, symbols)
        if expr is None or node.op != "call_function":
            continue
        if node.target in DIVISIONS:
            divisor = _expression(node.args[1], symbols)
            if divisor is not None:
                yield sympy.Ne(divisor, 0)
        if isinstance(node.meta["val"], torch.SymInt):
            if not _is_read(node):
                yield sympy.Ge(expr, -(2**63))
                yield sympy.Lt(expr, 2**63)
        elif node.target is operator.pow:
            yield sympy.Le(sympy.Abs(expr), sys.float_info.max)


def _expression(node: Any, symbols: Collection[sympy.Symbol]) -> sympy.Expr | None:
    """What a node is in numbers of the call; None if it depends on something else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    expr = value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat)) else None
    return expr if expr is not None and expr.free_symbols <= {*symbols} else None


def _calls(
    program: torch.export.ExportedProgram, values: Mapping[sympy.Symbol, float]
) -> list[_Call]:
    """The ops on tensors and the outputs of a program, with its parts (no_grad regions)."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    return [call for graph in graphs for call in _calls_of(graph, values)]


def _calls_of(graph: fx.Graph, values: Mapping[sympy.Symbol, float]) -> list[_Call]:
    names: dict[fx.Node, str] = {}  # of the values that are tensors
    found = []

    def argument(value: Any, numbers: list[float]) -> str:
        if isinstance(value, (list, tuple)):
            return f"({', '.join(argument(v, numbers) for v in value)})"
        if isinstance(value, fx.Node):
            if value in names:
                return names[value]
            value = _evaluated(value.meta.get("val"), values)
        if isinstance(value, (int, float)):
            numbers.append(value)
            return type(value).__name__
        return str(value)

    for node in graph.nodes:
        if node.op == "placeholder":
            is_read = all(_is_read(user) for user in node.users)
            if not is_read and not isinstance(node.meta.get("val"), SYMBOLIC):
                names[node] = f"%{len(names)}"
        elif node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op == "output" or _has_tensors(node.meta.get("val")):
            given = [*node.args, *(v for _, v in sorted(node.kwargs.items()))]
            if node.op != "output" and not isinstance(node.target, OpOverload):
                given = [v for v in given if not _is_symbolic(v)]  # a region has constants inside
            numbers: list[float] = []
            text = f"{node.target} {argument(given, numbers)} {sorted(node.kwargs)}"
            found.append(_Call(node, text, numbers))
            names[node] = f"%{len(names)}"
    return found


def _is_read(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.item.default


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), SYMBOLIC)


def _has_tensors(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, Tensor) for part in parts)


def _evaluated(value: Any, values: Mapping[sympy.Symbol, float]) -> Any:
    """A number; "size" if it depends on a size."""
    if not isinstance(value, SYMBOLIC):
        return value
    expr = value.node.expr.xreplace({s: sympy.sympify(v) for s, v in values.items()})
    if expr.free_symbols:
        return "size"
    if isinstance(value, torch.SymBool):
        return bool(expr)
    return int(expr) if isinstance(value, torch.SymInt) else float(expr)


def _is_same(a: Any, b: Any) -> bool:
    return not isinstance(a, Tensor) or torch.equal(a, b)


def _error(found: str, source: str | None) -> CaptureError:
    return CaptureError(
        "the forward does more with a number than compute",
        source=source,
        found=found,
        remedy="leave out isinstance(number, float), type(number), torch.tensor(number) and"
        " f-strings of it",
    )
