"""The partitioner's problem in integers: a DAG in topological order with a cost on every node.

Costs are floats scaled by one power of two (`chain_cut.integers`), so every comparison is exact
and a proof is a proof. This file knows no torch.
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
        """A graph of N costs and of edges (a, b) with a < b; those given twice count once."""
        before: list[set[int]] = [set() for _ in costs]
        after: list[set[int]] = [set() for _ in costs]
        for a, b in edges:
            before[b].add(a)
            after[a].add(b)
        neighbours = (tuple(tuple(sorted(of)) for of in each) for each in (before, after))
        return cls(tuple(costs), *neighbours)

    @property
    def size(self) -> int:
        """Nodes and edges: what it costs to look at everything once."""
        return len(self.costs) + sum(map(len, self.after))

    @property
    def is_chain(self) -> bool:
        """Whether there is one topological order only: each node depends on the one before it."""
        return all(v in self.after[v - 1] for v in range(1, len(self.costs)))

    def reversed(self) -> Dag:
        """The same graph from its end; node v becomes node N - 1 - v.

        A cut of one into K stages, read backwards, is a cut of the other.
        """
        last = len(self.costs) - 1

        def turn(neighbours: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(last - v for v in reversed(of)) for of in reversed(neighbours))

        return Dag(self.costs[::-1], turn(self.after), turn(self.before))

    def with_twins_ordered(self) -> Dag:
        """The same graph, nodes of equal cost and equal neighbours in a row, one after the other.

        Twins can change places in any cut, so one of the best keeps them in order. N! equal orders
        of N twins become one.
        """
        twins: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}
        more = []
        for v, key in enumerate(zip(self.costs, self.before, self.after, strict=True)):
            if key in twins:
                more.append((twins[key], v))
            twins[key] = v
        if not more:
            return self
        edges = [(a, b) for a, after in enumerate(self.after) for b in after]
        return Dag.of(self.costs, [*edges, *more])
