"""What F keeps for the backward: a policy's choice among the values of a stage's joint graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.passes._torch import min_cut_saved
from autopipe.passes.remat_policies import Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten


def keep(
    graph: fx.Graph,
    policy: Policy,
    forward: set[fx.Node],
    late: set[fx.Node],
    held: Sequence[fx.Node],
    received: Sequence[fx.Node],
    results: int,
) -> set[fx.Node]:
    """The values that a policy would keep, more than the backward reads perhaps.

    Args:
        graph: joint graph; the runtime's context (`ctx`) is its first placeholder.
        policy: see `policies`.
        forward: what the forward makes.
        late: what depends on a gradient, and so cannot be kept.
        held: placeholders of what the stage holds, which is there anyway.
        received: placeholders of what it received, which is always among the result.
        results: how many of the graph's results are the forward's.
    """
    if policy in ("full", 0.0):
        return set(received)
    if policy == "none":
        return forward | set(received)
    budget = 1.0 if policy == "min-cut" else float(policy)
    # The partitioner merges equal calls first, so its choice may lack a received value that a call
    # merged away here still starts from.
    return (_min_cut(graph, results, budget) - late - set(held)) | set(received)


def _min_cut(graph: fx.Graph, results: int, budget: float) -> set[fx.Node]:
    """What functorch's partitioner keeps. It is shown the calls behind the methods of `ctx`."""
    ctx = next(iter(graph.nodes))
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node is ctx:
            continue
        if node.op != "call_method":
            env[node] = copy.node_copy(node, env.__getitem__)
            continue
        _, *arguments = node.args
        target: Any = aten.clone.default
        if node.target != "in_suggested_format":  # the operator stands before its arguments
            start = {"draw": 1, "with_grad": 0}[node.target]
            target, arguments = arguments[start], arguments[start + 1 :]
        arguments, kwargs = fx.map_arg((arguments, node.kwargs), env.__getitem__)
        env[node] = copy.create_node(
            "call_function", target, tuple(arguments), kwargs, name=node.name
        )
        env[node].meta = dict(node.meta)
    fakes = [n.meta["val"] for n in copy.nodes if n.op == "placeholder"]
    kept = min_cut_saved(fx.GraphModule({}, copy), fakes, results, budget)
    return {node for node in graph.nodes if node is not ctx and env[node].name in kept}
