"""Find which ops write to whose memory, for passes that move ops within a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .fx_utils import has_side_effect, memory_owners, remove_dead_calls, written_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import fx


class InPlaceWrites:
    """The in-place writes of a graph, by the memory that they change.

    Attributes:
        graph: the graph.
        owner: for each node, the node that allocated its memory.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.owner = memory_owners(graph)
        self._calls: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            for owner in dict.fromkeys(self.owner[t] for t in written_arguments(node)):
                self._calls.setdefault(owner, []).append(node)

    def writers_of(self, node: fx.Node) -> list[fx.Node]:
        """Return the ops that write to the memory of `node`, in order.

        There are none if no op of the graph allocated that memory.
        """
        owner = self.owner.get(node)
        if owner is None or owner.op != "call_function":
            return []
        return self._calls.get(owner, [])

    def remove_unread(self, owners: Iterable[fx.Node]) -> None:
        """Erase the writes to the memory of these owners if nothing in the graph reads it."""
        remove_dead_calls(self.graph)
        for owner in owners:
            views = [n for n in self.graph.nodes if self.owner.get(n) is owner]
            harmless = {*views, *self.new_users_before_write(owner)}
            if all(user in harmless for n in views for user in n.users):
                for node in reversed(views):
                    if has_side_effect(node) and not node.users:
                        self.graph.erase_node(node)
        remove_dead_calls(self.graph)

    def new_users_before_write(self, owner: fx.Node) -> list[fx.Node]:
        """Return the users of a value added since this analysis, before its first write."""
        first = self._calls[owner][0]
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        return [u for u in owner.users if u not in self.owner and order[u] < order[first]]
