"""Annotated + a stage for each call → Annotated whose calls stand stage by stage.

A convex cut of a graph is a contiguous cut of another order of its calls: that in which they stand
stage by stage, and within a stage as before. Only the order changes: names, looks and costs stay,
and so do random numbers, which a captured program draws by where its calls stood at first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from autopipe.passes.graph import is_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autopipe.passes.ir import Annotated


def reordered(annotated: Annotated, stage_of: Mapping[fx.Node, int]) -> Annotated:
    """The same program, the calls of stage 0 first, then those of stage 1, and so on.

    Args:
        annotated: what was captured, and its costs.
        stage_of: for each call that is no size its stage; no call is in an earlier stage than what
            it depends on, sizes included.
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
            if is_size(source):  # as late as can be
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
    module = fx.GraphModule({}, graph, type(captured.graph_module).__name__)
    moved = replace(captured, graph_module=module, original_positions=tuple(positions))
    result = replace(annotated, captured=moved)
    moved.verify()
    result.verify()
    return result
