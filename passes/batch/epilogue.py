"""The graph that runs once a step, on the whole batch's values; built call by call (`combine`)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Epilogue:
    """A graph whose placeholders are named after nodes of the main graph, and ``batch_size``."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.placeholders: dict[str, fx.Node] = {}

    def given(self, node: fx.Node) -> fx.Node:
        """What stands for a combined value, or for a buffer as it was before the call."""
        found = self._placeholder(node.name)
        found.meta["val"] = node.meta["val"]
        return found

    def batch_size(self) -> fx.Node:
        """What stands for the number of samples in the whole batch."""
        return self._placeholder("batch_size")

    def _placeholder(self, name: str) -> fx.Node:
        if name not in self.placeholders:
            self.placeholders[name] = self.graph.placeholder(name)
        return self.placeholders[name]

    def copied(self, node: fx.Node, argument: Callable[[fx.Node], Any]) -> fx.Node:
        """A call of the main graph, its arguments mapped."""
        new = self.graph.node_copy(node, argument)
        new.meta = dict(node.meta)
        return new

    def finished(
        self, outputs: Sequence[str], program: Sequence[fx.Node], results: Sequence[fx.Node]
    ) -> fx.GraphModule:
        """The graph in order: placeholders (the `outputs`, `batch_size`, buffers), then calls.

        Calls follow `program`, and what they need just before them: some may write in place.
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
        for before, after in pairwise(ordered):
            before.append(after)
        return fx.GraphModule({}, self.graph, "Epilogue")
