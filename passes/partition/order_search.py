"""The search for the best cut of a DAG over all topological orders, and its proof.

Every convex cut is a contiguous cut of some order, so orders are searched, and each is cut exactly
(`chain_cut.bottleneck`). In turn, each step with what the ones before left open:

1. bounds that hold for every cut (`lower_bounds.py`);
2. list schedules (`list_scheduling.py`) for limits between the bound and the best cut so far;
3. beam searches over ideals (`ideal_search.py`), wider and wider, from both ends of the graph;
4. the exhaustive search for anything better than the best cut. None there: the cut is optimal.
   Where that is too much work, it refutes what lower limits it can, which raises the bound.

Work is counted in nodes looked at, never in seconds, so that results are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from .chain_cut import bottleneck
from .dag import Dag
from .ideal_search import Side, search
from .list_scheduling import schedules
from .lower_bounds import Bounds, simple_bound

LIST_PROBES = 8
"""Limits for which list schedules are made."""

ROUNDS = ((8, 1 << 14), (32, 1 << 16), (128, 1 << 18), (512, 1 << 20))
"""(ideals that beam searches keep, nodes that one exhaustive search may look at), by round."""

SET_NODES = 1 << 15
"""Up to so many nodes there are searches over ideals (sets of N bits for each of N nodes)."""

WORK = 1 << 21
"""Nodes that all searches over ideals look at; a good tenth of a second each million."""

CLOSE = 4096
"""At a gap of one part in so many, more list schedules and beam searches are not worth their work,
nor is a better bound."""

CLOSE_STEPS = 1 << 18
"""Nor, at that gap, are exhaustive searches of more nodes than this."""


@dataclass(frozen=True)
class Solved:
    """Orders to cut, and what is known of the best cut.

    Attributes:
        orders: topological orders, the best cut's last; the first is the one that was given.
        high: the largest stage of the best cut, that of the last order.
        low: no cut has a smaller largest stage.
        steps: nodes that searches over ideals have looked at.
    """

    orders: tuple[tuple[int, ...], ...]
    high: int
    low: int
    steps: int = 0

    def better(self, dag: Dag, stages: int, orders: Iterable[Sequence[int]]) -> Solved:
        """With those of `orders` whose best contiguous cut is better than any before."""
        best = self
        for order in orders:
            prefix = list(accumulate((dag.costs[v] for v in order), initial=0))
            if (high := bottleneck(prefix, stages)) < best.high:
                best = replace(best, orders=(*best.orders, tuple(order)), high=high)
        return best


def solve(dag: Dag, stages: int) -> Solved:
    """The least largest stage over all convex cuts of `dag` into `stages` stages, or near it.

    Args:
        dag: N nodes; their numbers are the order that is cut first.
        stages: K, 1 <= K <= N.
    """
    total = sum(dag.costs)
    best = Solved((), total + 1, simple_bound(dag.costs, stages))
    best = best.better(dag, stages, [range(len(dag.costs))])
    if dag.is_chain:  # one order only
        best = replace(best, low=best.high)
    if best.low == best.high:
        return best
    dag = dag.with_twins_ordered()
    bounds = Bounds.of(dag, stages)
    best = replace(best, low=bounds.least(best.low, best.high))
    best = _lists(best, dag, stages, bounds.tails)
    if len(dag.costs) > SET_NODES:
        return best
    ends = _Ends.of(dag, bounds)
    for width, steps in ROUNDS:
        if best.high - best.low <= best.low // CLOSE and steps > CLOSE_STEPS:
            break
        for backward in (False, True):
            best = _beam(best, ends, backward, width)
        best = _exhaust(best, ends, steps)
    return best


def alternatives(dag: Dag, stages: int, limit: int) -> list[tuple[int, ...]]:
    """More topological orders, from both ends, that may have a cut within a limit.

    For a second criterion: so many cuts are equally good that it matters which one is found.

    Args:
        dag: N nodes.
        stages: K, 1 <= K <= N.
        limit: T, of some cut.
    """
    if dag.is_chain or not limit:
        return []
    bounds, orders = Bounds.of(dag, stages), []
    for backward in (False, True):
        side = dag.reversed() if backward else dag
        tails = bounds.heads[::-1] if backward else bounds.tails
        found = [*schedules(side, limit, tails)]
        if len(dag.costs) <= SET_NODES:
            width, steps = ROUNDS[0][0], WORK >> 3
            beam = search(Side.of(side, tails), stages, limit, width=width, steps=steps)
            found += [beam.order] if beam.order else []
        orders += [_turned(order) if backward else order for order in found]
    return orders


def refutes(dag: Dag, stages: int, limit: int) -> bool:
    """Whether it is proven, with as much work as `solve` does, that no cut keeps a limit.

    Args:
        dag: N nodes.
        stages: K, 1 <= K <= N.
        limit: T >= 0.
    """
    if limit < simple_bound(dag.costs, stages):
        return True
    if dag.is_chain:
        return limit < bottleneck(list(accumulate(dag.costs, initial=0)), stages)
    dag = dag.with_twins_ordered()
    bounds = Bounds.of(dag, stages)
    if bounds.refutes(limit) or len(dag.costs) > SET_NODES:
        return bounds.refutes(limit)
    ends = _Ends.of(dag, bounds)
    for side in (ends.forward, ends.backward):
        found = search(side, stages, limit, width=None, steps=WORK)
        if found.order is not None or found.complete:
            return found.order is None
    return False


@dataclass(frozen=True)
class _Ends:
    """A graph to be searched from either end."""

    stages: int
    forward: Side
    backward: Side

    @classmethod
    def of(cls, dag: Dag, bounds: Bounds) -> _Ends:
        backward = Side.of(dag.reversed(), bounds.heads[::-1])
        return cls(bounds.stages, Side.of(dag, bounds.tails), backward)

    def search(
        self, best: Solved, limit: int, backward: bool, width: int | None, steps: int = WORK
    ) -> tuple[Solved, bool]:
        """What is known after a search for a cut within `limit`, and whether it decided that."""
        side = self.backward if backward else self.forward
        steps = min(steps, WORK - best.steps)
        found = search(side, self.stages, limit, width=width, steps=steps)
        best = replace(best, steps=best.steps + found.steps)
        if found.order is not None:
            order = _turned(found.order) if backward else found.order
            return best.better(self.forward.dag, self.stages, [order]), True
        if found.complete:
            return replace(best, low=limit + 1), True
        return best, False


def _lists(best: Solved, dag: Dag, stages: int, tails: Sequence[int]) -> Solved:
    """List schedules for limits between the bound and the best cut."""
    low = best.low
    for _ in range(LIST_PROBES):
        if best.high - low <= best.low // CLOSE:
            break
        limit = (low + best.high - 1) // 2
        high = best.high
        best = best.better(dag, stages, schedules(dag, limit, tails))
        if best.high == high:
            low = limit + 1
    return best


def _beam(best: Solved, ends: _Ends, backward: bool, width: int) -> Solved:
    """Beam searches for limits between the bound and the best cut."""
    low = best.low
    while best.high - low > best.low // CLOSE and best.steps < WORK:
        limit, high = (low + best.high - 1) // 2, best.high
        best, _ = ends.search(best, limit, backward, width)
        if best.high == high:
            low = limit + 1
    return best


def _exhaust(best: Solved, ends: _Ends, steps: int) -> Solved:
    """Is anything better than the best cut? If that is too much, lower limits are refuted."""
    limit = best.high - 1
    while best.low <= limit and best.steps < WORK:
        best, decided = ends.search(best, limit, False, None, steps)
        if not decided:
            best, decided = ends.search(best, limit, True, None, steps)
        if decided:
            limit = min(best.high - 1, (limit + best.high) // 2)
        elif limit - best.low > best.low // CLOSE:
            limit = (best.low + limit) // 2
        else:
            break
    return best


def _turned(order: Sequence[int]) -> tuple[int, ...]:
    """An order of the reversed graph as one of the graph."""
    return tuple(len(order) - 1 - v for v in reversed(order))
