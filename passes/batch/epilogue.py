"""Build the epilogue: the graph that runs once per step, on the whole batch's values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from autopipe.passes.graph import graph_module
from autopipe.passes.ir import B

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import sympy


class Epilogue:
    """A graph whose placeholders are named after sizes or nodes of the captured graph."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.placeholders: dict[str, fx.Node] = {}

    def placeholder_for(self, node: fx.Node) -> fx.Node:
        """The placeholder for a combined value, or for a buffer as it was before the step."""
        found = self._placeholder(node.name)
        found.meta["val"] = node.meta["val"]
        return found

    def size(self, symbol: sympy.Symbol) -> fx.Node:
        """The placeholder for the number of samples in the whole batch, or for a length."""
        return self._placeholder("batch_size" if symbol == B else str(symbol))

    def _placeholder(self, name: str) -> fx.Node:
        if name not in self.placeholders:
            self.placeholders[name] = self.graph.placeholder(name)
        return self.placeholders[name]

    def copy_op(self, node: fx.Node, argument: Callable[[fx.Node], Any]) -> fx.Node:
        """Copy an op of the captured graph, with its arguments mapped by `argument`."""
        new = self.graph.node_copy(node, argument)
        new.meta = dict(node.meta)
        return new

    def finish(
        self, outputs: Sequence[str], program: Sequence[fx.Node], results: Sequence[fx.Node]
    ) -> fx.GraphModule:
        """Add the output and sort the graph: placeholders (outputs, batch size, buffers), then ops.

        Args:
            outputs: names of the captured graph's outputs, in order.
            program: ops whose order must be that of the captured graph, because some write in
                place. Each is placed right after the ops that it needs.
            results: the nodes that the epilogue returns.
        """
        self.graph.output(tuple(results))
        names = dict.fromkeys([*outputs, "batch_size", *self.placeholders])
        ordered = {self.placeholders[n]: None for n in names if n in self.placeholders}
        todo = [self.graph.output_node(), *reversed(program)]
        while todo:
            missing = [n for n in todo[-1].all_input_nodes if n not in ordered]
            if missing:
                todo += reversed(missing)
            else:
                ordered[todo.pop()] = None
        # In a new graph, placeholders come first and keep their names. Here, one that was added
        # late is named apart from an op, and that name may be the one of another placeholder.
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in ordered:
            if node.op == "placeholder":
                copies[node] = graph.placeholder(str(node.target))
                copies[node].meta = dict(node.meta)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return graph_module(graph, "Epilogue")
