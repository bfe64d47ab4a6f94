"""Copy the ops of a generated function, with draws that wait for no computed value.

Most random ops read only the shape of their argument: dropout on the CPU draws a mask that is
"like" a tensor. Here such a draw gets an empty tensor of that shape instead, so that it can happen
before anything is computed. `native_dropout`, the dropout of GPUs, becomes a draw of its mask and a
product. Draws have the same keys and draw the same numbers.
"""

from __future__ import annotations

from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from autopipe.passes.graph import SizeExpression, full_size, remove_dead_calls
from autopipe.passes.ir import PhaseFunction, results_of

if TYPE_CHECKING:
    from autopipe.passes.ir import StagePhases

aten = torch.ops.aten

READS_THE_SHAPE = frozenset(
    f"aten::{name}"
    for name in (
        *("rand_like", "randn_like", "randint_like", "uniform", "normal_functional"),
        *("exponential", "geometric", "log_normal", "cauchy", "random"),
    )
)
"""Random operators of which only the first argument is a tensor, and only its shape is read."""


def with_loose_draws(
    stage: StagePhases, function: PhaseFunction, device: torch.device
) -> tuple[fx.Node, PhaseFunction]:
    """Copy a function to a graph of its own.

    Args:
        stage: its joint graph has the ops.
        function: what it takes, computes and returns.
        device: written instead of the device that the stage was traced for.

    Returns:
        The placeholder of `ctx`; the function, with arguments named after the stage's values.
    """
    graph = fx.Graph()
    ctx, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    labels = [*stage.state, *stage.receives, *(f"grad_{n}" for n in stage.tangents)]
    label_of = dict(zip(placeholders, labels, strict=True))
    env = {ctx: graph.placeholder("ctx")}
    for node in function.arguments:
        env[node] = graph.placeholder(label_of.get(node, node.name))
        env[node].meta = dict(node.meta)
    for node in function.nodes:
        env[node] = copy = graph.node_copy(node, env.__getitem__)
        copy.args, copy.kwargs = _moved((copy.args, copy.kwargs), stage.device, device)
    copied = [env[n] for n in function.nodes]
    returned = [env[v] for v in function.results if isinstance(v, fx.Node)]
    graph.output([*returned, *(env[n] for n in function.gradients)])
    for node in copied:
        if node.op == "call_method" and node.target == "draw":
            _loosen(graph, node, stage.device, device)
    remove_dead_calls(graph)
    nodes = tuple(n for n in graph.nodes if n.op in ("call_function", "call_method"))
    arguments = tuple(env[n] for n in function.arguments)
    found = iter(results_of(graph))  # draws may have been replaced
    results = tuple(next(found) if isinstance(v, fx.Node) else v for v in function.results)
    gradients = dict(zip(found, function.gradients.values(), strict=True))
    return env[ctx], PhaseFunction(arguments, nodes, results, gradients)


def _moved(arguments: Any, traced: torch.device, device: torch.device) -> Any:
    return map_aggregate(arguments, lambda v: device if v == traced else v)


def _loosen(graph: fx.Graph, draw: fx.Node, traced: torch.device, device: torch.device) -> None:
    """Replace the tensor of which a draw reads only the shape; change the draw in place."""
    ctx, index, op, *args = draw.args
    source = args[0] if args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return
    if any(isinstance(v, fx.Node) for v in (*args[1:], *draw.kwargs.values())):
        return
    name = op._schema.name  # type: ignore[union-attr]
    if op is aten.native_dropout.default and isinstance(draw.meta.get("val"), (tuple, list)):
        _multiply_by_mask(graph, draw, source)
    elif op is not aten.bernoulli.p and name not in READS_THE_SHAPE:
        return
    value = source.meta["val"]
    with graph.inserting_before(draw):
        empty = graph.call_function(
            aten.empty_strided.default,
            ([_number(n) for n in value.shape], [_number(n) for n in value.stride()]),
            {"dtype": value.dtype, "device": _moved(value.device, traced, device)},
        )
    empty.meta = {k: v for k, v in source.meta.items() if k in ("val", "stack_trace")}
    draw.args = (ctx, index, op, empty, *args[1:])


def _number(size: Any) -> Any:
    expr = full_size(size)
    return SizeExpression(expr) if expr.free_symbols else int(expr)


def _multiply_by_mask(graph: fx.Graph, draw: fx.Node, source: fx.Node) -> None:
    """Replace the first result of `native_dropout` by the product of its argument and the mask."""
    probability: Any = draw.args[4]
    dropped, mask = draw.meta["val"][:2]
    scale = 0.0 if probability == 1 else 1 / (1 - probability)
    users = [n for n in draw.users if n.target is getitem and n.args[1] == 0]
    for user in users:
        with graph.inserting_before(user):
            kept = graph.call_function(getitem, (draw, 1))
            kept.meta = {"val": mask}
            product = graph.call_function(aten.mul.Tensor, (source, kept))
            scaled = graph.call_function(aten.mul.Scalar, (product, scale))
        for node in (product, scaled):
            node.meta = {**user.meta, "val": dropped}
        user.replace_all_uses_with(scaled)
