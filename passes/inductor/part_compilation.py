"""GraphPart -> CompiledPart: build the graph that inductor takes; note for which sizes it holds.

Symbolic sizes are arguments of the compiled code. What torch asks of them while it compiles becomes
the conditions of the result, so code that was specialised for some sizes serves no others.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from autopipe.errors import UnsupportedError
from autopipe.passes._torch import ShapeEnv, emit_expression
from autopipe.passes._torch_inductor import compile_graph, compiler_fake_mode
from autopipe.passes._torch_modes import (
    autocast_device_types,
    without_dispatch_modes,
    without_function_modes,
)
from autopipe.passes._torch_sizes import create_size_symbol, size_of_expression
from autopipe.passes.graph import (
    SizeExpression,
    SizeNames,
    fingerprint,
    in_named_sizes,
    name_sizes,
)
from autopipe.passes.phases import TensorMeta

from .compiled_part import CompiledPart

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from autopipe.passes.ir import GraphPart, Sizes


class _Arguments(NamedTuple):
    """The example arguments of a part.

    Attributes:
        symbols: the symbolic sizes, and the sizes that stand for them.
        tensors: fake.
        environment: of the symbols.
    """

    symbols: dict[sympy.Symbol, Any]
    tensors: list[Tensor]
    environment: ShapeEnv


def part_key(part: GraphPart) -> Hashable:
    """Equal for parts with the same code.

    Args:
        part: under any name.
    """
    metas = tuple(TensorMeta.of(n.meta["val"]) for n in part.arguments)
    devices = tuple(_device(part, n) for n in part.arguments)
    return fingerprint(part.graph), metas, devices, part.traced, part.device, part.symbols


def compile_part(
    part: GraphPart, sizes: Sizes, options: Mapping[str, Any], *, symbolic: bool
) -> CompiledPart:
    """Compile a part.

    Args:
        part: what to compile.
        sizes: values of its symbols, for which the result is valid.
        options: settings of inductor.
        symbolic: whether it should be valid for other sizes, too.

    Raises:
        Exception: of any type: inductor cannot compile it.
    """
    metas = tuple(TensorMeta.of(n.meta["val"]) for n in part.arguments)
    used = _used(part, metas) if symbolic else ()
    arguments = _examples(part, metas, sizes, used)
    module = _module(part, sizes, used)
    with _plain_state():
        compiled = compile_graph(module, [*arguments.symbols.values(), *arguments.tensors], options)
    fixed = tuple(sympy.Eq(s, sizes[s]) for s in part.symbols if not symbolic)
    found = CompiledPart(compiled, used, fixed or _conditions(used, arguments.environment), metas)
    if not found.holds_for(sizes):
        raise UnsupportedError(
            "compiled code does not hold for the sizes that it was compiled for",
            node=part.name,
            found=", ".join(map(str, found.conditions)),
        )
    return found


@contextmanager
def _plain_state() -> Iterator[None]:
    """Compile without gradients, autocast and modes, as generated programs run."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in autocast_device_types():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(without_dispatch_modes())
        stack.enter_context(without_function_modes())
        yield


def _device(part: GraphPart, node: fx.Node) -> torch.device:
    device: torch.device = node.meta["val"].device
    return part.device if device == part.traced else device


def _used(part: GraphPart, metas: Sequence[TensorMeta]) -> tuple[sympy.Symbol, ...]:
    """The symbols on which a part depends, in its order."""
    found: set[Any] = set()
    for meta in metas:
        for n in (*meta.shape, *meta.stride):
            found |= n.free_symbols if isinstance(n, sympy.Basic) else set()

    def note(value: Any) -> Any:
        if isinstance(value, SizeExpression):
            found.update(value.expr.free_symbols)
        return value

    for node in part.graph.nodes:
        map_aggregate((node.args, node.kwargs), note)
    return tuple(s for s in part.symbols if s in found)


def _examples(
    part: GraphPart, metas: Sequence[TensorMeta], sizes: Sizes, used: Sequence[sympy.Symbol]
) -> _Arguments:
    """Fake arguments of a part."""
    mode = compiler_fake_mode()
    environment = mode.shape_env
    assert environment is not None
    own: dict[Any, Any] = {}
    symbols: dict[sympy.Symbol, Any] = {}
    for s in used:
        own[s], symbols[s] = create_size_symbol(environment, str(s), sizes[s])
    name_sizes(environment, SizeNames({symbol: s for s, symbol in own.items()}, {}))
    values = {s: sympy.Integer(n) for s, n in sizes.items()}

    def size(n: Any) -> Any:
        if isinstance(n, int):
            return n
        if n.free_symbols & own.keys():
            return size_of_expression(environment, n.xreplace(own), int(n.xreplace(values)))
        return int(n.xreplace(values))

    tensors = []
    with mode:
        for meta, node in zip(metas, part.arguments, strict=True):
            shape, stride = (list(map(size, n)) for n in (meta.shape, meta.stride))
            device = _device(part, node)
            tensors.append(torch.empty_strided(shape, stride, dtype=meta.dtype, device=device))
    return _Arguments(symbols, tensors, environment)


def _module(part: GraphPart, sizes: Sizes, used: Sequence[sympy.Symbol]) -> fx.GraphModule:
    """The graph with its symbols as leading arguments, and with arithmetic on them as ops."""
    graph = fx.Graph()
    values = {s: graph.placeholder(f"size_{i}") for i, s in enumerate(used)}
    env: dict[fx.Node, fx.Node] = {}

    def written(value: Any) -> Any:
        if isinstance(value, torch.device) and value == part.traced:
            return part.device
        if not isinstance(value, SizeExpression):
            return value
        if not value.expr.free_symbols & values.keys():
            return value.at(sizes)
        return emit_expression(value.expr, values)

    for node in part.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.placeholder(node.name)
            continue
        args, kwargs = map_aggregate((node.args, node.kwargs), written)
        args, kwargs = map_aggregate(
            (args, kwargs), lambda v: env[v] if isinstance(v, fx.Node) and v in env else v
        )
        if node.op == "output":
            graph.output(*args)
        else:
            env[node] = graph.call_function(node.target, args, kwargs)
    return fx.GraphModule(torch.nn.Module(), graph)


def _conditions(used: Sequence[sympy.Symbol], environment: ShapeEnv) -> tuple[sympy.Basic, ...]:
    """What torch asked of symbolic sizes, in the part's symbols; and that each is at least 2."""
    found: dict[Any, None] = {s >= 2: None for s in used}
    found |= {in_named_sizes(g.expr, environment): None for g in environment.guards}
    return tuple(c for c in found if c.free_symbols)
