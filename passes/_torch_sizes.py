"""Symbolic sizes that remember their arithmetic: private names of torch, for traces with symbols.

A trace computes the same few sizes again and again: whether a tensor is contiguous, the bytes of
its memory. torch simplifies the expressions anew each time, and records all arithmetic in the
graph. Here each operation is computed once for each pair of expressions, and not recorded: a pass
reads the expression off the size.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import DimDynamic

from .one_at_a_time import replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

OPERATIONS = (
    *("_add", "_sub", "_mul", "_mod", "_int_floordiv", "_sym_max", "_sym_min", "_neg"),
    *("_eq", "_ne", "_gt", "_lt", "_le", "_ge", "and_", "or_", "sym_not", "wrap_int", "wrap_bool"),
    *("_is_contiguous", "_is_non_overlapping_and_dense_indicator"),
    *("_is_channels_last_contiguous_2d", "_is_channels_last_contiguous_3d"),
    *("_is_channels_last_strides_2d", "_is_channels_last_strides_3d"),
)
"""Methods of `SymNode` that return a size or a condition; also what torch asks of each tensor."""

ANSWERS = (
    *("guard_bool", "guard_int", "expect_true", "guard_size_oblivious"),
    *("guard_or_false", "guard_or_true", "statically_known_true"),
)
"""Methods that return a number or a truth value; the first answer may be recorded as a guard."""


def create_size_symbol(environment: ShapeEnv, name: str, example: int) -> tuple[Any, Any]:
    """Create a symbol for a size of at least 2.

    Args:
        environment: where.
        name: for torch's messages.
        example: its value while tracing.

    Returns:
        The symbol, and the size that stands for it in shapes.
    """
    from torch._dynamo.source import ConstantSource  # slow to import; torch.export needs it, too

    source = ConstantSource(name)
    symbol = environment.create_symbol(
        example, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
    )
    return symbol, environment.create_symintnode(symbol, hint=example, source=source)


def size_of_expression(environment: ShapeEnv, expr: sympy.Expr, example: int) -> Any:
    """Create a size from an expression in an environment's symbols.

    Args:
        environment: of the symbols.
        expr: the expression.
        example: its value while tracing.
    """
    return environment.create_symintnode(expr, hint=example)


def size_in_graph(text: str) -> int:
    """Stand for a size in a graph that is traced; it never runs."""
    raise AssertionError(f"the size {text} was not replaced by its expression")


@contextmanager
def remembered_sizes(environment: ShapeEnv, memory: dict[Any, Any]) -> Iterator[None]:
    """While tracing: compute each operation on sizes once, and record those that are used.

    A size that an op uses is recorded as one call of `size_in_graph`, however it was computed.

    Args:
        environment: of the sizes.
        memory: what was computed so far, empty at first; traces in one environment may share it.
    """

    def build(tracer: Any, expr: sympy.Expr, out: Any = None) -> Any:
        proxy = tracer.create_proxy("call_function", size_in_graph, (str(expr),), {})
        proxy.node.meta["val"] = out
        proxy_tensor.set_proxy_slot(out, tracer, proxy_tensor.thunkify(tracer, lambda: proxy))
        return out

    with ExitStack() as stack:
        for name in (*OPERATIONS, *ANSWERS):
            if hasattr(SymNode, name):
                remembered = _remembered(name, environment, memory, silent=name in OPERATIONS)
                stack.enter_context(replaced(SymNode, name, remembered))
        stack.enter_context(replaced(proxy_tensor, "_build_proxy_for_sym_expr", build))
        yield


def _remembered(
    name: str, environment: ShapeEnv, memory: dict[Any, Any], *, silent: bool
) -> Callable[..., Any]:
    original = getattr(SymNode, name)

    def remembered(node: SymNode, *others: Any) -> Any:
        if node.shape_env is not environment:
            return original(node, *others)
        key = (name, node._expr, *map(_key, others)) if silent else (name, node._expr)
        found = memory.get(key, memory)
        if found is memory:
            if silent:
                with disable_proxy_modes_tracing():
                    found = original(node, *others)
            else:
                found = original(node, *others)
            memory[key] = found
        return found

    return remembered


def _key(other: Any) -> Any:
    """What identifies an operand: a size, a number, or a list of these."""
    if isinstance(other, SymNode):
        return other._expr, other.pytype
    return tuple(map(_key, other)) if isinstance(other, (list, tuple)) else (other, type(other))
