"""Reorder the ops of a captured program stage by stage.

A convex cut of a graph is a contiguous cut of another order of its ops: stage by stage, and within
a stage in the old order. Only the order changes: names, metadata and costs stay the same. So do
random numbers, which are keyed by the original positions of the ops.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from autopipe.passes.graph import graph_module, is_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autopipe.passes.ir import Annotated


def reorder_by_stage(annotated: Annotated, stage_of: Mapping[fx.Node, int]) -> Annotated:
    """Return the same program, the ops of stage 0 first, then those of stage 1, and so on.

    Args:
        annotated: the captured program and its costs.
        stage_of: the stage of each op that is not a size; no op is in an earlier stage than the ops
            that it depends on, directly or through sizes.
    """
    captured = annotated.captured
    old = list(captured.graph_module.graph.nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    position = {node: at for at, node in enumerate(old)}
    positions = []

    def copy(node: fx.Node) -> None:
        if node in copies:
            return
        for source in node.all_input_nodes:
            if is_size(source):  # as late as possible
                copy(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        positions.append(captured.original_position(position[node]))

    for node in old:
        if node.op == "placeholder":
            copy(node)
    for node in sorted(stage_of, key=lambda node: (stage_of[node], position[node])):
        copy(node)
    for node in old:  # sizes that only the output needs
        copy(node)
    graph.lint()
    module = graph_module(graph, type(captured.graph_module).__name__)
    reordered = replace(captured, graph_module=module, original_positions=tuple(positions))
    result = replace(annotated, captured=reordered)
    reordered.verify()
    result.verify()
    return result
