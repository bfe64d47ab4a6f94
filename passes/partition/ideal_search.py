"""Is there a cut into K stages, none above a limit? A search over the ideals of the DAG.

Minimising the largest stage over all convex cuts is the simple assembly line balancing problem of
type 2 (SALBP-2), and for a given limit T it is SALBP-1. Its dynamic programme (Held, Karp and
Shareshian, "Assembly-line balancing: dynamic programming with precedence constraints", Operations
Research 1963) goes over ideals: sets of nodes that hold the producers of each of their nodes. What
matters of the way to an ideal is (stages used, load of the open stage), of which the least in
lexicographic order is best. Both are one integer here, the clock: stages used times T plus load.

Exact: without a bound on the width every ideal is seen that could lead to a cut. Left out are

- opening a stage while a node still fits into the open one (Jackson, "A computing procedure for a
  line balancing problem", Management Science 1956: some best cut fills every stage maximally);
- states whose idle time is more than K stages of T leave over;
- states that owe a node which, with all that depends on it, no longer fits in the stages left.

With a bound on the width it is a beam search: the states with the least idle time stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import accumulate
from operator import or_

from .dag import Dag

PRICE_NODES = 1024
"""What so many nodes more add to the price of a step: sets get longer."""

_State = tuple[int, int, int, int, int]
"""(clock, idle, ready nodes as a bit set, index of the state before it, node added)"""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        order: a topological order whose contiguous cuts keep the limit, or None.
        complete: nothing was left out, so that no order means that no cut keeps the limit.
        steps: what it cost, in nodes looked at.
    """

    order: tuple[int, ...] | None
    complete: bool
    steps: int


@dataclass(frozen=True)
class Side:
    """A graph as seen from one end, as the search needs it.

    Attributes:
        dag: N nodes; the sum of their costs > 0.
        tails: for each node at most the cost of itself and all that depends on it.
        bits: for each node the set that holds it alone. Sets are bits of integers.
        before: for each node the set of its producers.
        free: the set of the nodes that cost nothing.
    """

    dag: Dag
    tails: tuple[int, ...]
    bits: tuple[int, ...]
    before: tuple[int, ...]
    free: int

    @classmethod
    def of(cls, dag: Dag, tails: tuple[int, ...]) -> Side:
        """The graph with its sets, O(N^2) bits."""
        bits = tuple(1 << v for v in range(len(dag.costs)))
        before = tuple(sum(bits[p] for p in producers) for producers in dag.before)
        free = sum(bit for bit, cost in zip(bits, dag.costs, strict=True) if not cost)
        return cls(dag, tails, bits, before, free)


def search(side: Side, stages: int, limit: int, *, width: int | None, steps: int) -> Found:
    """Look for a cut of a graph into at most `stages` stages of at most `limit`.

    (A cut into fewer is also one into K, as long as there are K nodes: any stage can be parted.)

    Args:
        side: N nodes, from one end.
        stages: K >= 1.
        limit: T, at least the largest cost.
        width: ideals kept among those of one size; None keeps all.
        steps: the search gives up when it has looked at this many nodes; a node of a graph with
            thousands counts more than once, as its sets are long.
    """
    bits, before, free = side.bits, side.before, side.free
    costs, after, N = side.dag.costs, side.dag.after, len(side.bits)
    spare = stages * limit - sum(costs)
    due = _due(side, stages, limit)
    if due is None or spare < 0:
        return Found(None, True, N)
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
                return Found(None, False, spent)
            here = len(trail)
            trail.append((parent, added))
            load = clock % limit
            room = limit - load if load or not clock else 0
            fits = [rest & -rest] if (rest := ready & free) else []
            rest = 0 if rest else ready
            while rest:
                bit = rest & -rest
                rest ^= bit
                spent += price
                if costs[bit.bit_length() - 1] <= room:
                    fits.append(bit)
            if not fits:  # open a stage
                clock, idle, rest = clock + room, idle + room, ready
                if idle > spare or due[clock // limit - 1] & ~done:
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
        return Found(None, complete, spent)
    ((_, _, _, parent, added),) = level.values()
    return Found(_way(trail, parent, added), True, spent)


def _due(side: Side, stages: int, limit: int) -> list[int] | None:
    """For each stage the nodes, as a set, that must be in it or in one before it.

    None if some node cannot be in any.
    """
    due = [0] * stages
    for bit, tail in zip(side.bits, side.tails, strict=True):
        last = stages - max(1, -(-tail // limit))
        if last < 0:
            return None
        due[last] |= bit
    return list(accumulate(due, or_))


def _way(trail: Sequence[tuple[int, int]], parent: int, added: int) -> tuple[int, ...]:
    """The nodes in the order in which they were added."""
    order = [added]
    while parent > 0:  # state 0 is the empty set
        parent, added = trail[parent]
        order.append(added)
    return tuple(reversed(order))
