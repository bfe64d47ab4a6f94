"""Write some phases of a stage as parts that another compiler may compile, and what joins them.

A part is pure: tensors in, tensors out. Ops that need the runtime (draws, gradient sums) and ops of
other libraries stand in the function itself::

    def RBW_0_b4(ctx, args):
        p_weight, x, grad_y = args
        args.clear()
        bernoulli = ctx.draw(0, torch.ops.aten.bernoulli.p, ...)
        arguments = [p_weight, x, grad_y, bernoulli];  p_weight = ... = None
        part = RBW_0_b4_part_1(ctx, arguments);  arguments = None
        mm = part[0]
        accumulate = ctx.accumulate(0, mm)

Parts are functions of the source like all others. Whoever compiles them replaces them by name.
"""

from __future__ import annotations

from operator import getitem
from typing import TYPE_CHECKING

import torch
from torch import fx

from autopipe.passes._torch import OpOverload
from autopipe.passes.graph import Names, is_random, literal, tensors_of, written_arguments
from autopipe.passes.ir import GraphPart, PhaseFunction, results_of

from .loose_draws import with_loose_draws
from .stage_ops import RESERVED, OpLine, OpWriter, function_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import sympy

    from autopipe.passes.ir import StagePhases

UNKNOWN_SHAPES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


def parted_function(
    stage: StagePhases,
    function: PhaseFunction,
    device: torch.device,
    name: str,
    symbols: Sequence[sympy.Symbol] = (),
) -> tuple[list[str], list[GraphPart]]:
    """Write the ops of some phases as a function ``name(ctx, args)`` and its parts.

    Args:
        stage: its joint graph has the ops.
        function: what it takes, computes and returns.
        device: where the function runs.
        name: of the function.
        symbols: the symbolic sizes; their values are in ``ctx.sizes``.

    Returns:
        Python source of the function, then of its parts; and the parts.

    Raises:
        UnsupportedError: an op, or one of its arguments, has no expression in Python.
    """
    ctx, function = with_loose_draws(stage, function, device)
    names = Names(RESERVED | {str(s) for s in symbols})
    env = {n: names.create(n.name) for n in function.arguments}
    parameters = list(env.values())
    env[ctx] = "ctx"
    writer = OpWriter(env, stage.device, device)
    needed = {v for v in function.results if isinstance(v, fx.Node)} | set(function.gradients)
    lines: list[OpLine] = [_sum(i, n, env, names) for n, i in _sums(function, function.arguments)]
    texts: list[str] = []
    parts: list[GraphPart] = []
    for step in _steps(function):
        if step.is_part:
            results = _results(step.nodes, needed)
            if results:
                part_name = f"{name}_part_{len(parts) + 1}"
                part = _part(step.nodes, results, part_name, stage, device, symbols)
                parts.append(part)
                texts.append(_part_text(part))
                lines += _call(part, step.nodes, results, env, names, ctx)
        else:
            for node in step.nodes:
                text, reads = writer.call(node), writer.reads(node)
                env[node] = names.create(node.name)
                lines.append(OpLine(env[node], text, reads, node))
        lines += [_sum(i, n, env, names) for n, i in _sums(function, step.nodes)]
    returned = [env[v] if isinstance(v, fx.Node) else literal(v) for v in function.results]
    read = symbols if writer.uses_sizes else ()
    return [function_text(name, read, parameters, lines, returned), *texts], parts


class _Step:
    """Ops that run one after the other.

    Attributes:
        nodes: in the order of the graph.
        is_part: whether they are a part for another compiler.
    """

    def __init__(self, nodes: list[fx.Node], *, is_part: bool) -> None:
        self.nodes, self.is_part = nodes, is_part


def _steps(function: PhaseFunction) -> Iterator[_Step]:
    """Divide the ops: even steps run as they are, odd ones are parts. Each op runs in the first
    step in which its arguments are known. (An op that writes to an argument keeps the order.)
    """
    if any(written_arguments(n) for n in function.nodes):
        yield _Step(list(function.nodes), is_part=False)
        return
    place: dict[fx.Node, int] = dict.fromkeys(function.arguments, 0)
    steps: dict[int, list[fx.Node]] = {}
    for node in function.nodes:
        first = max((place.get(n, 0) for n in node.all_input_nodes), default=0)
        if node.target is not getitem or node.args[0] in function.arguments:
            first += first % 2 != (0 if _runs_as_it_is(node) else 1)
        place[node] = first
        steps.setdefault(first, []).append(node)
    for i, nodes in sorted(steps.items()):
        yield _Step(nodes, is_part=i % 2 == 1 and any(map(_computes, nodes)))


def _runs_as_it_is(node: fx.Node) -> bool:
    """Whether an op stays out of parts: only the runtime, or only eager execution, can run it."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return True
    if node.target.namespace not in ("aten", "prims") or is_random(node):
        return True
    if node.target is torch.ops.aten.empty_strided.default:  # a draw reads its shape
        return True
    if any(tag in node.target.tags for tag in UNKNOWN_SHAPES):
        return True
    found = [t for n in (node, *node.all_input_nodes) for t in tensors_of(n)]
    plain = all(t.layout is torch.strided and not t.is_complex() for t in found)
    return not plain or any(not tensors_of(n) for n in (node, *node.all_input_nodes))


def _computes(node: fx.Node) -> bool:
    """Whether an op is more than a view of its argument."""
    if node.target is getitem:
        return False
    returns = node.target._schema.returns  # type: ignore[union-attr]
    return not any(r.alias_info is not None for r in returns)


def _sums(function: PhaseFunction, nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, int]]:
    """The gradients among some nodes, and their positions among the stage's parameters."""
    for node in nodes:
        for i in function.gradients.get(node, ()):
            yield node, i


def _sum(i: int, node: fx.Node, env: Mapping[fx.Node, str], names: Names) -> OpLine:
    text = f"ctx.accumulate({i}, {env[node]})"
    return OpLine(names.create("accumulate"), text, ("ctx", env[node]), node, typed=False)


def _arguments(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What some ops read besides their own results, in order."""
    own = set(nodes)
    return list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in own))


def _results(nodes: Sequence[fx.Node], needed: set[fx.Node]) -> list[fx.Node]:
    """Which of some ops' results are read by others, or by other functions."""
    own = set(nodes)
    return [
        n for n in nodes if n in needed or any(u not in own for u in n.users if u.op != "output")
    ]


def _part(
    nodes: Sequence[fx.Node],
    results: Sequence[fx.Node],
    name: str,
    stage: StagePhases,
    device: torch.device,
    symbols: Sequence[sympy.Symbol],
) -> GraphPart:
    """Copy some ops to a graph of their own."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for source in _arguments(nodes):
        env[source] = graph.placeholder(source.name)
        env[source].meta = dict(source.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output([env[n] for n in results])
    part = GraphPart(
        name, stage.index, graph, device, stage.device, tuple(symbols), stage.conditions
    )
    part.verify()
    return part


def _part_text(part: GraphPart) -> str:
    """Write a part as a function: what runs if nobody replaces it."""
    names = Names(RESERVED | {str(s) for s in part.symbols})
    env = {n: names.create(n.name) for n in part.arguments}
    parameters = list(env.values())
    writer, lines = OpWriter(env, part.traced, part.device), []
    for node in part.graph.nodes:
        if node.op == "call_function":
            text, reads = writer.call(node), writer.reads(node)
            env[node] = names.create(node.name)
            lines.append(OpLine(env[node], text, reads, node))
    returned = [env[n] for n in results_of(part.graph)]
    symbols = part.symbols if writer.uses_sizes else ()
    return function_text(part.name, symbols, parameters, lines, returned)


def _call(
    part: GraphPart,
    nodes: Sequence[fx.Node],
    results: Sequence[fx.Node],
    env: dict[fx.Node, str],
    names: Names,
    ctx: fx.Node,
) -> Iterator[OpLine]:
    """Write a call of a part. It empties the list of its arguments, so that it can free them."""
    passed = tuple(env[n] for n in _arguments(nodes))
    arguments, returned = names.create("arguments"), names.create("part")
    yield OpLine(arguments, f"[{', '.join(passed)}]", passed, ctx, typed=False)
    text = f"{part.name}(ctx, {arguments})"
    yield OpLine(returned, text, ("ctx", arguments), ctx, typed=False)
    for i, node in enumerate(results):
        env[node] = names.create(node.name)
        yield OpLine(env[node], f"{returned}[{i}]", (returned,), node)
