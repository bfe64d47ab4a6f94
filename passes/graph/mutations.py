"""Who writes to whose memory, for passes that move calls to another place in the program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .fx_utils import has_side_effect, memory_owners, remove_dead_calls, written_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import fx


class InPlaceWrites:
    """The calls of a graph that write in place, by the memory that they write to."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.owner = memory_owners(graph)
        self._calls: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            for owner in dict.fromkeys(self.owner[t] for t in written_arguments(node)):
                self._calls.setdefault(owner, []).append(node)

    def to(self, node: fx.Node) -> list[fx.Node]:
        """The calls that write to the memory of `node`, in order; none to what is no call's."""
        owner = self.owner.get(node)
        if owner is None or owner.op != "call_function":
            return []
        return self._calls.get(owner, [])

    def drop(self, moved: Iterable[fx.Node]) -> None:
        """Erase the writes to the memory of these nodes, where nothing in the graph reads it."""
        remove_dead_calls(self.graph)
        for owner in moved:
            here = [n for n in self.graph.nodes if self.owner.get(n) is owner]
            known = {*here, *self.copies(owner)}
            if all(user in known for n in here for user in n.users):
                for node in reversed(here):
                    if has_side_effect(node) and not node.users:
                        self.graph.erase_node(node)
        remove_dead_calls(self.graph)

    def copies(self, owner: fx.Node) -> list[fx.Node]:
        """Calls on a value before anything is written to it."""
        first = self._calls[owner][0]
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        return [u for u in owner.users if u not in self.owner and order[u] < order[first]]
