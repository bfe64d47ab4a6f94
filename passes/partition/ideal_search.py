"""Search the ideals of a DAG for a cut into K stages, none above a limit.

Minimising the largest stage over all convex cuts is the simple assembly line balancing problem of
type 2 (SALBP-2), and for a given limit T it is SALBP-1. Its dynamic programme (Held, Karp and
Shareshian, "Assembly-line balancing: dynamic programming with precedence constraints", Operations
Research 1963) visits ideals: sets of nodes that contain the producers of each of their nodes. Only
(stages used, load of the open stage) matters of the path to an ideal, and the lexicographically
least pair is best. Here both are one integer, the clock: stages used times T plus load.

Without a bound on the width the search is exact: every ideal that could lead to a cut is visited.
It prunes

- opening a stage while a node still fits into the open one (Jackson, "A computing procedure for a
  line balancing problem", Management Science 1956: some best cut fills every stage maximally);
- states whose idle time is more than K stages of T allow;
- states that lack a node which, with all its descendants, no longer fits in the stages left.

With a bound on the width it is a beam search that keeps the states with the least idle time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import accumulate
from operator import or_

from .dag import Dag

PRICE_NODES = 1024
"""A step on a graph of N nodes counts 1 + N // PRICE_NODES times: sets get longer."""

_State = tuple[int, int, int, int, int]
"""(clock, idle, ready nodes as a bit set, index of the state before it, node added)"""


@dataclass(frozen=True)
class IdealSearchResult:
    """Result of `search_ideals`.

    Attributes:
        order: a topological order with a contiguous cut within the limit, or None.
        complete: nothing that could lead to a cut was pruned: if `order` is None, no cut is within
            the limit.
        steps: work done, in nodes visited.
    """

    order: tuple[int, ...] | None
    complete: bool
    steps: int


@dataclass(frozen=True)
class SearchGraph:
    """A graph, or its reverse, with the node sets that the search needs.

    Attributes:
        dag: N nodes; the sum of their costs > 0.
        tails: for each node at most the cost of it and all its descendants.
        bits: for each node the set with only that node. Sets are bits of integers.
        before: for each node the set of its producers.
        free: the set of the nodes of cost 0.
    """

    dag: Dag
    tails: tuple[int, ...]
    bits: tuple[int, ...]
    before: tuple[int, ...]
    free: int

    @classmethod
    def of(cls, dag: Dag, tails: tuple[int, ...]) -> SearchGraph:
        """Build the sets of a graph, O(N^2) bits.

        Args:
            dag: N nodes.
            tails: see the class.
        """
        bits = tuple(1 << v for v in range(len(dag.costs)))
        before = tuple(sum(bits[p] for p in producers) for producers in dag.before)
        free = sum(bit for bit, cost in zip(bits, dag.costs, strict=True) if not cost)
        return cls(dag, tails, bits, before, free)


def search_ideals(
    graph: SearchGraph, stages: int, limit: int, *, width: int | None, steps: int
) -> IdealSearchResult:
    """Search a cut of a graph into at most K stages of at most `limit`.

    (A cut into fewer stages is enough: with K nodes or more, some stage can be split.)

    Args:
        graph: N nodes.
        stages: K >= 1.
        limit: T, at least the largest cost.
        width: how many ideals of one size stay in the beam; None: all.
        steps: the search stops after visiting this many nodes; in a graph with thousands of nodes,
            a visit counts more than once, because the sets are long.
    """
    bits, before, free = graph.bits, graph.before, graph.free
    costs, after, N = graph.dag.costs, graph.dag.after, len(graph.bits)
    idle_budget = stages * limit - sum(costs)
    due = _due(graph, stages, limit)
    if due is None or idle_budget < 0:
        return IdealSearchResult(None, True, N)
    price, spent, complete = 1 + N // PRICE_NODES, N, True
    trail: list[tuple[int, int]] = []
    start = sum(bit for bit, producers in zip(bits, before, strict=True) if not producers)
    level: dict[int, _State] = {0: (0, 0, start, -1, -1)}
    for _ in range(N):
        states = list(level.items())
        if width is not None and len(states) > width:
            states = nsmallest(width, states, key=lambda item: item[1][1])
            complete = False
        level = {}
        for done, (clock, idle, ready, parent, added) in states:
            if spent > steps:
                return IdealSearchResult(None, False, spent)
            here = len(trail)
            trail.append((parent, added))
            load = clock % limit
            remaining = limit - load if load or not clock else 0
            fits = [rest & -rest] if (rest := ready & free) else []
            rest = 0 if rest else ready
            while rest:
                bit = rest & -rest
                rest ^= bit
                spent += price
                if costs[bit.bit_length() - 1] <= remaining:
                    fits.append(bit)
            if not fits:  # open a stage
                clock, idle, rest = clock + remaining, idle + remaining, ready
                if idle > idle_budget or due[clock // limit - 1] & ~done:
                    continue
                while rest:
                    bit = rest & -rest
                    rest ^= bit
                    fits.append(bit)
            for bit in fits:
                v = bit.bit_length() - 1
                now, then = done | bit, clock + costs[v]
                spent += price + len(after[v]) * price // 4
                if now in level and level[now][0] <= then:
                    continue
                open_to = ready ^ bit
                for u in after[v]:
                    if not before[u] & ~now:
                        open_to |= bits[u]
                level[now] = (then, idle, open_to, here, v)
    if not level:
        return IdealSearchResult(None, complete, spent)
    ((_, _, _, parent, added),) = level.values()
    return IdealSearchResult(_path(trail, parent, added), True, spent)


def _due(graph: SearchGraph, stages: int, limit: int) -> list[int] | None:
    """For each stage the set of nodes that must be in it or in an earlier one.

    None: some node cannot be in any stage.
    """
    due = [0] * stages
    for bit, tail in zip(graph.bits, graph.tails, strict=True):
        last = stages - max(1, -(-tail // limit))
        if last < 0:
            return None
        due[last] |= bit
    return list(accumulate(due, or_))


def _path(trail: Sequence[tuple[int, int]], parent: int, added: int) -> tuple[int, ...]:
    """The nodes in the order in which they were added."""
    order = [added]
    while parent > 0:  # state 0 is the empty set
        parent, added = trail[parent]
        order.append(added)
    return tuple(reversed(order))
