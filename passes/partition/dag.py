"""The graph for the search: a DAG in topological order with an integer cost on every node.

Costs are floats scaled by one power of two (`scaled_integers`), so every comparison is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Dag:
    """A directed acyclic graph; node v is the v-th of a topological order.

    Attributes:
        costs: N integers >= 0.
        before: the producers of each node, each smaller than the node, increasing.
        after: the consumers of each node, each larger than the node, increasing.
    """

    costs: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, costs: Sequence[int], edges: Iterable[tuple[int, int]]) -> Dag:
        """Build a graph.

        Args:
            costs: N costs.
            edges: (a, b) pairs with a < b; repeated pairs count once.
        """
        before: list[set[int]] = [set() for _ in costs]
        after: list[set[int]] = [set() for _ in costs]
        for a, b in edges:
            before[b].add(a)
            after[a].add(b)
        neighbours = (tuple(tuple(sorted(of)) for of in each) for each in (before, after))
        return cls(tuple(costs), *neighbours)

    @property
    def size(self) -> int:
        """Number of nodes and edges."""
        return len(self.costs) + sum(map(len, self.after))

    @property
    def is_chain(self) -> bool:
        """Whether there is only one topological order: each node depends on the one before it."""
        return all(v in self.after[v - 1] for v in range(1, len(self.costs)))

    def reversed(self) -> Dag:
        """The graph with its edges reversed; node v becomes node N - 1 - v.

        A cut of one into K stages, read backward, is a cut of the other.
        """
        last = len(self.costs) - 1

        def reverse(neighbours: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(last - v for v in reversed(of)) for of in reversed(neighbours))

        return Dag(self.costs[::-1], reverse(self.after), reverse(self.before))

    def with_twins_ordered(self) -> Dag:
        """The graph with an edge from each node to its next twin: equal cost, equal neighbours.

        Twins can be swapped in any cut, so some best cut keeps them in order. N! equivalent orders
        of N twins become one.
        """
        twins: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}
        extra = []
        for v, key in enumerate(zip(self.costs, self.before, self.after, strict=True)):
            if key in twins:
                extra.append((twins[key], v))
            twins[key] = v
        if not extra:
            return self
        edges = [(a, b) for a, after in enumerate(self.after) for b in after]
        return Dag.of(self.costs, [*edges, *extra])
