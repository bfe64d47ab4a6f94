"""Cuts of a DAG by list scheduling: stages filled up to a limit, one after the other, by a rule.

Of the nodes that are ready and fit into the open stage the first by the rule goes in; where none
fits, the next stage opens. The rules are priority rules of assembly line balancing (Scholl,
"Balancing and Sequencing of Assembly Lines", 1999, section 5.1): largest cost; largest ranked
positional weight (Helgeson and Birnie 1961), here with the tails of `lower_bounds.py`; and, so
that few values cross, the newest ready node as in Kahn's order.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush

from .dag import Dag

STEPS_PER_SIZE = 8
"""A schedule is given up when it has looked at nodes so many times the graph's size: where many
nodes wait and few fit, K times N are looked at."""


def schedules(dag: Dag, limit: int, tails: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Topological orders whose contiguous cuts into stages of `limit` waste little.

    Args:
        dag: N nodes.
        limit: T, at least the largest cost.
        tails: for each node, what it and all that depends on it cost.
    """
    for key in (None, [-tail for tail in tails]):
        if (order := _by_rank(dag, limit, key)) is not None:
            yield order
    yield _largest_that_fits(dag, limit)


def _by_rank(dag: Dag, limit: int, rank: Sequence[int] | None) -> tuple[int, ...] | None:
    """The ready node of the least rank that fits; without ranks the newest."""
    waits = [len(producers) for producers in dag.before]
    fresh = [v for v, count in enumerate(waits) if count == 0]
    ready: list[tuple[int, int]] = []
    aside: list[tuple[int, int]] = []
    order: list[int] = []
    room, steps, age = limit, STEPS_PER_SIZE * dag.size, 0
    while True:
        for v in fresh:
            age -= 1
            heappush(ready, (age if rank is None else rank[v], v))
        fresh = []
        if not ready:
            if not aside:
                return tuple(order)
            ready, aside, room = aside, [], limit
            heapify(ready)
        steps -= 1
        if steps < 0:
            return None
        item = heappop(ready)
        v = item[1]
        if dag.costs[v] > room:
            aside.append(item)
            continue
        room -= dag.costs[v]
        order.append(v)
        for u in dag.after[v]:
            waits[u] -= 1
            if waits[u] == 0:
                fresh.append(u)


def _largest_that_fits(dag: Dag, limit: int) -> tuple[int, ...]:
    """The ready node of the largest cost that fits."""
    waits = [len(producers) for producers in dag.before]
    ready = sorted((dag.costs[v], -v) for v, count in enumerate(waits) if count == 0)
    order: list[int] = []
    room = limit
    while ready:
        at = bisect_right(ready, (room, 1)) - 1
        if at < 0:
            room = limit
            continue
        cost, v = ready.pop(at)
        room -= cost
        order.append(-v)
        for u in dag.after[-v]:
            waits[u] -= 1
            if waits[u] == 0:
                insort(ready, (dag.costs[u], -u))
    return tuple(order)
