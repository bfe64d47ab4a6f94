"""Select the values that F saves for the backward: ask the policy about a stage's joint graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.passes._torch import min_cut_saved
from autopipe.passes.graph import graph_module
from autopipe.passes.remat_policies import JointValues

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.passes.remat_policies import RematPolicy

aten = torch.ops.aten


def select_saved(
    graph: fx.Graph,
    policy: RematPolicy,
    forward: set[fx.Node],
    late: set[fx.Node],
    held: Sequence[fx.Node],
    received: Sequence[fx.Node],
    results: int,
) -> set[fx.Node]:
    """The values that F saves under a policy; the backward may not read all of them.

    Args:
        graph: joint graph; its first placeholder is the runtime's context (`ctx`).
        policy: the stage's policy.
        forward: values that the forward computes or reads.
        late: values that depend on a gradient, which F cannot save.
        held: placeholders of the stage's parameters, buffers and constants: they need no saving.
        received: placeholders of the received values, which are always saved.
        results: how many of the graph's results belong to the forward.

    Returns:
        Nodes of the graph.
    """

    def min_cut(budget: float) -> set[fx.Node]:
        return _min_cut(graph, results, budget) - late - set(held)

    # The partitioner first merges equal ops, so its choice may lack a received value that a
    # merged op still reads: received values are saved regardless of the policy's choice.
    selected = policy.select(JointValues(forward, set(received), min_cut))
    return {*selected, *received}


def _min_cut(graph: fx.Graph, results: int, budget: float) -> set[fx.Node]:
    """The values that functorch's partitioner saves.

    It gets a copy of the graph without `ctx`: each call of a method of `ctx` is replaced by the op
    that the method runs.
    """
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
        if node.target != "in_suggested_format":  # its first argument is the operator
            start = {"draw": 1, "watched": 0, "with_grad": 0}[node.target]
            target, arguments = arguments[start], arguments[start + 1 :]
        arguments, kwargs = fx.map_arg((arguments, node.kwargs), env.__getitem__)
        env[node] = copy.create_node(
            "call_function", target, tuple(arguments), kwargs, name=node.name
        )
        env[node].meta = dict(node.meta)
    fakes = [n.meta["val"] for n in copy.nodes if n.op == "placeholder"]
    saved = min_cut_saved(graph_module(copy, "Joint"), fakes, results, budget)
    return {node for node in graph.nodes if node is not ctx and env[node].name in saved}
