"""Rewrite a joint graph so that it contains the ops that the backward recomputes.

F comes first. The backward follows in its own order, with each recomputing op of R just before its
first use, so that a recomputed value is alive no longer than necessary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

aten = torch.ops.aten


class JointRewriter:
    """Writes a new joint graph in which each op of R comes before its first use.

    Args:
        forward: the nodes that F computes.
        backward: the nodes that depend on a tangent.
        saved: the values that F may save for the backward.

    Attributes:
        graph: the graph written so far.
        phase_of: the phase of every op written so far ("W" stands for B or W).
        saved_names: names of the saved values that the backward reads, in the order of first use.
    """

    def __init__(self, forward: set[fx.Node], backward: set[fx.Node], saved: set[fx.Node]) -> None:
        self.graph = fx.Graph()
        self.phase_of: dict[str, str] = {}
        self.saved_names: dict[str, None] = {}
        self._forward, self._backward, self._saved = forward, backward, saved
        self._in_forward: dict[fx.Node, fx.Node] = {}  # old node → the node that F uses for it
        self._in_backward: dict[fx.Node, fx.Node] = {}  # old node → the one that R, B and W use
        self._before_write: dict[fx.Node, fx.Node] = {}  # buffer that F writes to → F's copy of it

    def write_placeholders(
        self,
        owned: Sequence[fx.Node],
        received: Sequence[fx.Node],
        tangents: Sequence[fx.Node],
        written: Sequence[fx.Node],
    ) -> None:
        """Write the placeholders, and copy the buffers that F writes to.

        Args:
            owned: the runtime's `ctx`, then parameters, buffers and constants: present in every
                phase.
            received: values from other stages and the caller, which F uses.
            tangents: gradients that the stage receives.
            written: the buffers among `owned` that F writes to.
        """
        for node in [*owned, *received, *tangents]:
            self._in_forward[node] = self.graph.node_copy(node)
        for node in [*(n for n in owned if n not in written), *tangents]:
            self._in_backward[node] = self._in_forward[node]
        self._before_write = {node: self._copy_before_write(node) for node in written}

    def _copy_before_write(self, node: fx.Node) -> fx.Node:
        copy = self.graph.call_function(aten.clone.default, (self._in_forward[node],))
        copy.meta = dict(node.meta)
        self.phase_of[copy.name] = "F"
        return copy

    def write_calls(
        self, joint: fx.Graph, forward_results: Sequence[Any], gradients: Sequence[Any]
    ) -> fx.Graph:
        """Write all ops, F's first, and the output.

        Args:
            joint: the graph to rewrite.
            forward_results: its results that F computes.
            gradients: its results that the backward computes.

        Returns:
            The complete graph.
        """
        calls = [n for n in joint.nodes if n.op in ("call_function", "call_method")]
        for node in calls:
            if node in self._forward:
                self._in_forward[node] = self._copy_call(node, self._in_forward, "F")
        for node in calls:
            if node in self._backward:
                for source in node.all_input_nodes:
                    self._backward_value(source)
                self._in_backward[node] = self._copy_call(node, self._in_backward, "W")
        results = [self._in_forward[r] for r in forward_results]
        results += [self._backward_value(g) for g in gradients]
        self.graph.output(tuple(results))
        for node in reversed(self.graph.nodes):  # an unused `getitem`, a copy of a buffer
            if node.op == "call_function" and not node.users:
                del self.phase_of[node.name]
                self.graph.erase_node(node)
        return self.graph

    def _copy_call(self, node: fx.Node, arguments: dict[fx.Node, fx.Node], phase: str) -> fx.Node:
        copy_argument: Callable[[fx.Node], fx.Node] = arguments.__getitem__
        new = self.graph.node_copy(node, copy_argument)
        if new.target is aten.view.default:
            # Some kernels (batch norm's backward) return other strides than their fakes, so a
            # traced view may be impossible. Eager autograd and reshape check the real strides.
            new.target = aten.reshape.default
        self.phase_of[new.name] = phase
        return new

    def _backward_value(self, node: fx.Node) -> fx.Node:
        """Return the node that the backward uses for a value: saved by F, or recomputed.

        Walks depth first with a list instead of recursion: a stage's forward may be thousands of
        ops deep.
        """
        todo = [node]
        while todo:
            top = todo[-1]
            if top in self._in_backward:
                todo.pop()
            elif top in self._before_write:
                self._use_saved(top, self._before_write[top])
            elif top in self._saved and not isinstance(top.meta["val"], (tuple, list)):
                self._use_saved(top, self._in_forward[top])
            elif missing := [n for n in top.all_input_nodes if n not in self._in_backward]:
                todo += missing
            else:
                self._in_backward[top] = self._copy_call(top, self._in_backward, "R")
        return self._in_backward[node]

    def _use_saved(self, node: fx.Node, saved: fx.Node) -> None:
        self._in_backward[node] = saved
        self.saved_names[saved.name] = None
