"""Topological orders by list scheduling: fill stages up to a limit, one after the other.

Of the ready nodes that fit into the open stage, a priority rule picks the next one; if none fits,
the next stage opens. The rules come from assembly line balancing (Scholl,
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
"""A schedule is abandoned after this many visits times the graph's size: if many nodes are
ready and few fit, it would visit K times N nodes."""


def list_schedules(dag: Dag, limit: int, tails: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Topological orders whose contiguous cuts into stages of `limit` leave little idle time.

    Args:
        dag: N nodes.
        limit: T, at least the largest cost.
        tails: for each node, the cost of it and of all its descendants.
    """
    for key in (None, [-tail for tail in tails]):
        if (order := _by_rank(dag, limit, key)) is not None:
            yield order
    yield _largest_that_fits(dag, limit)


def _by_rank(dag: Dag, limit: int, rank: Sequence[int] | None) -> tuple[int, ...] | None:
    """Always pick the fitting ready node of the least rank; without ranks, the newest one."""
    missing = [len(producers) for producers in dag.before]
    new = [v for v, count in enumerate(missing) if count == 0]
    ready: list[tuple[int, int]] = []
    deferred: list[tuple[int, int]] = []
    order: list[int] = []
    free, steps, age = limit, STEPS_PER_SIZE * dag.size, 0
    while True:
        for v in new:
            age -= 1
            heappush(ready, (age if rank is None else rank[v], v))
        new = []
        if not ready:
            if not deferred:
                return tuple(order)
            ready, deferred, free = deferred, [], limit
            heapify(ready)
        steps -= 1
        if steps < 0:
            return None
        item = heappop(ready)
        v = item[1]
        if dag.costs[v] > free:
            deferred.append(item)
            continue
        free -= dag.costs[v]
        order.append(v)
        for u in dag.after[v]:
            missing[u] -= 1
            if missing[u] == 0:
                new.append(u)


def _largest_that_fits(dag: Dag, limit: int) -> tuple[int, ...]:
    """Always pick the fitting ready node of the largest cost."""
    missing = [len(producers) for producers in dag.before]
    ready = sorted((dag.costs[v], -v) for v, count in enumerate(missing) if count == 0)
    order: list[int] = []
    free = limit
    while ready:
        at = bisect_right(ready, (free, 1)) - 1
        if at < 0:
            free = limit
            continue
        cost, v = ready.pop(at)
        free -= cost
        order.append(-v)
        for u in dag.after[-v]:
            missing[u] -= 1
            if missing[u] == 0:
                insort(ready, (dag.costs[u], -u))
    return tuple(order)
