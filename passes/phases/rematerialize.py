"""A joint graph written anew, with what the backward computes again spelled out.

F stands first. The backward follows in its own order, and each call of R just before its first use,
so that a recomputed value lives no longer than it must.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

aten = torch.ops.aten


class JointRewriter:
    """Writes a joint graph anew, with R's calls spelled out just before their use.

    Attributes:
        phase_of: the phase of every call written so far (W stands for B or W).
        kept: names of what the backward takes from F, in the order of first use.
    """

    def __init__(self, forward: set[fx.Node], late: set[fx.Node], saved: set[fx.Node]) -> None:
        self.forward, self.late, self.saved = forward, late, saved
        self.graph = fx.Graph()
        self.early: dict[fx.Node, fx.Node] = {}  # what F knows a value as
        self.again: dict[fx.Node, fx.Node] = {}  # what the backward knows it as
        self.kept: dict[str, None] = {}
        self.phase_of: dict[str, str] = {}

    def placeholders(
        self,
        lasting: Sequence[fx.Node],
        received: Sequence[fx.Node],
        tangents: Sequence[fx.Node],
        written: set[fx.Node],
    ) -> None:
        """`lasting` ones are there in every phase, but for the buffers that F has `written` to."""
        for node in [*lasting, *received, *tangents]:
            self.early[node] = self.graph.node_copy(node)
        for node in [*(n for n in lasting if n not in written), *tangents]:
            self.again[node] = self.early[node]
        self.written = {node: self._before(node) for node in written}

    def _before(self, node: fx.Node) -> fx.Node:
        """F's copy of a buffer that it is about to change."""
        copy = self.graph.call_function(aten.clone.default, (self.early[node],))
        copy.meta = dict(node.meta)
        self.phase_of[copy.name] = "F"
        return copy

    def calls(
        self, joint: fx.Graph, forward_results: Sequence[Any], gradients: Sequence[Any]
    ) -> fx.Graph:
        """Write all calls and the results: F's, then the gradients."""
        calls = [n for n in joint.nodes if n.op in ("call_function", "call_method")]
        for node in calls:
            if node in self.forward:
                self.early[node] = self._write(node, self.early.__getitem__, "F")
        for node in calls:
            if node in self.late:
                for source in node.all_input_nodes:
                    self.recall(source)
                self.again[node] = self._write(node, self.again.__getitem__, "W")
        results = [self.early[r] for r in forward_results] + [self.recall(g) for g in gradients]
        self.graph.output(tuple(results))
        for node in reversed(self.graph.nodes):  # an unused part of a result, an old buffer
            if node.op == "call_function" and not node.users:
                del self.phase_of[node.name]
                self.graph.erase_node(node)
        return self.graph

    def _write(self, node: fx.Node, argument: Callable[[fx.Node], fx.Node], phase: str) -> fx.Node:
        new = self.graph.node_copy(node, argument)
        if new.target is aten.view.default:
            # Some kernels (batch norm's backward) give other strides than their fakes, which a
            # view that was traced may not fit. Eager asks the real ones; so does reshape.
            new.target = aten.reshape.default
        self.phase_of[new.name] = phase
        return new

    def recall(self, node: fx.Node) -> fx.Node:
        """The backward's version of a value: kept, or computed again (depth first, no recursion:
        a stage's forward may be thousands of calls deep)."""
        todo = [node]
        while todo:
            top = todo[-1]
            if top in self.again:
                todo.pop()
            elif top in self.written:
                self.again[top] = self.written[top]
                self.kept[self.written[top].name] = None
            elif top in self.saved and not isinstance(top.meta["val"], (tuple, list)):
                self.again[top] = self.early[top]
                self.kept[self.early[top].name] = None
            elif missing := [n for n in top.all_input_nodes if n not in self.again]:
                todo += missing
            else:
                self.again[top] = self._write(top, self.again.__getitem__, "R")
        return self.again[node]
