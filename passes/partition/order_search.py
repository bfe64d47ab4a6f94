"""Search all topological orders of a DAG for the best cut, and prove how good it is.

Every convex cut is a contiguous cut of some order, so orders are searched, and each is cut exactly
(`chain_cut.min_bottleneck`). The steps, each of which narrows the gap that the previous ones left:

1. bounds that hold for every cut (`lower_bounds.py`);
2. list schedules (`list_scheduling.py`) for limits between the bound and the best cut so far;
3. beam searches over ideals (`ideal_search.py`), wider and wider, from both ends of the graph;
4. an exhaustive search for anything better than the best cut. If there is none, the cut is
   optimal. Where that is too much work, lower limits are refuted, which raises the bound.

Work is counted in visited nodes, not in seconds, so results are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from .chain_cut import min_bottleneck
from .dag import Dag
from .ideal_search import SearchGraph, search_ideals
from .list_scheduling import list_schedules
from .lower_bounds import Bounds, simple_bound

LIST_PROBES = 8
"""How many limits list schedules are tried for."""

ROUNDS = ((8, 1 << 14), (32, 1 << 16), (128, 1 << 18), (512, 1 << 20))
"""By round: (width of beam searches, nodes that one exhaustive search may visit)."""

SET_NODES = 1 << 15
"""Up to this many nodes, ideals are searched (sets of N bits for each of N nodes)."""

WORK = 1 << 21
"""Nodes that all searches over ideals may visit; a million takes about 0.1 s."""

CLOSE = 4096
"""At a gap of one part in this many, list schedules, beam searches and better bounds stop."""

CLOSE_STEPS = 1 << 18
"""At that gap, exhaustive searches of more nodes than this stop too."""


@dataclass(frozen=True)
class OrderSearchResult:
    """Orders to cut, and bounds on the best cut.

    Attributes:
        orders: topological orders, each better than the one before; the first is the given one.
        bottleneck: the largest stage of the best cut, that of the last order.
        lower_bound: no cut has a smaller largest stage.
        steps: nodes that searches over ideals have visited.
    """

    orders: tuple[tuple[int, ...], ...]
    bottleneck: int
    lower_bound: int
    steps: int = 0

    def with_orders(
        self, dag: Dag, stages: int, orders: Iterable[Sequence[int]]
    ) -> OrderSearchResult:
        """Add those of `orders` whose best contiguous cut is better than any before.

        Args:
            dag: N nodes.
            stages: K.
            orders: topological orders.
        """
        best = self
        for order in orders:
            prefix = list(accumulate((dag.costs[v] for v in order), initial=0))
            if (bottleneck := min_bottleneck(prefix, stages)) < best.bottleneck:
                orders_so_far = (*best.orders, tuple(order))
                best = replace(best, orders=orders_so_far, bottleneck=bottleneck)
        return best


def search_orders(dag: Dag, stages: int) -> OrderSearchResult:
    """Minimize the largest stage over all convex cuts of a graph into K stages, approximately.

    Args:
        dag: N nodes; their numbering is the order that is cut first.
        stages: K, 1 <= K <= N.
    """
    total = sum(dag.costs)
    best = OrderSearchResult((), total + 1, simple_bound(dag.costs, stages))
    best = best.with_orders(dag, stages, [range(len(dag.costs))])
    if dag.is_chain:  # one order only
        best = replace(best, lower_bound=best.bottleneck)
    if best.lower_bound == best.bottleneck:
        return best
    dag = dag.with_twins_ordered()
    bounds = Bounds.of(dag, stages)
    best = replace(best, lower_bound=bounds.least(best.lower_bound, best.bottleneck))
    best = _try_list_schedules(best, dag, stages, bounds.tails)
    if len(dag.costs) > SET_NODES:
        return best
    ends = _BothEnds.of(dag, bounds)
    for width, steps in ROUNDS:
        if best.bottleneck - best.lower_bound <= best.lower_bound // CLOSE and steps > CLOSE_STEPS:
            break
        for backward in (False, True):
            best = _try_beams(best, ends, backward, width)
        best = _search_exhaustively(best, ends, steps)
    return best


def alternative_orders(dag: Dag, stages: int, limit: int) -> list[tuple[int, ...]]:
    """More topological orders, from both ends, that may have a cut within a limit.

    They serve a second criterion, which chooses among many equally good cuts.

    Args:
        dag: N nodes.
        stages: K, 1 <= K <= N.
        limit: T, the largest stage of some cut.
    """
    if dag.is_chain or not limit:
        return []
    bounds, orders = Bounds.of(dag, stages), []
    for backward in (False, True):
        graph = dag.reversed() if backward else dag
        tails = bounds.heads[::-1] if backward else bounds.tails
        found = [*list_schedules(graph, limit, tails)]
        if len(dag.costs) <= SET_NODES:
            width, steps = ROUNDS[0][0], WORK >> 3
            sets = SearchGraph.of(graph, tails)
            beam = search_ideals(sets, stages, limit, width=width, steps=steps)
            found += [beam.order] if beam.order else []
        orders += [_reversed_order(order) if backward else order for order in found]
    return orders


def is_refuted(dag: Dag, stages: int, limit: int) -> bool:
    """Whether it is proven, with as much work as `search_orders` does, that no cut keeps a limit.

    Args:
        dag: N nodes.
        stages: K, 1 <= K <= N.
        limit: T >= 0.
    """
    if limit < simple_bound(dag.costs, stages):
        return True
    if dag.is_chain:
        return limit < min_bottleneck(list(accumulate(dag.costs, initial=0)), stages)
    dag = dag.with_twins_ordered()
    bounds = Bounds.of(dag, stages)
    if bounds.refutes(limit) or len(dag.costs) > SET_NODES:
        return bounds.refutes(limit)
    ends = _BothEnds.of(dag, bounds)
    for graph in (ends.forward, ends.backward):
        found = search_ideals(graph, stages, limit, width=None, steps=WORK)
        if found.order is not None or found.complete:
            return found.order is None
    return False


@dataclass(frozen=True)
class _BothEnds:
    """A graph and its reverse, to search from either end."""

    stages: int
    forward: SearchGraph
    backward: SearchGraph

    @classmethod
    def of(cls, dag: Dag, bounds: Bounds) -> _BothEnds:
        backward = SearchGraph.of(dag.reversed(), bounds.heads[::-1])
        return cls(bounds.stages, SearchGraph.of(dag, bounds.tails), backward)

    def search(
        self,
        best: OrderSearchResult,
        limit: int,
        backward: bool,
        width: int | None,
        steps: int = WORK,
    ) -> tuple[OrderSearchResult, bool]:
        """Search for a cut within `limit`; return the result, and whether the limit is decided."""
        graph = self.backward if backward else self.forward
        steps = min(steps, WORK - best.steps)
        found = search_ideals(graph, self.stages, limit, width=width, steps=steps)
        best = replace(best, steps=best.steps + found.steps)
        if found.order is not None:
            order = _reversed_order(found.order) if backward else found.order
            return best.with_orders(self.forward.dag, self.stages, [order]), True
        if found.complete:
            return replace(best, lower_bound=limit + 1), True
        return best, False


def _try_list_schedules(
    best: OrderSearchResult, dag: Dag, stages: int, tails: Sequence[int]
) -> OrderSearchResult:
    """Try list schedules for limits between the bound and the best cut."""
    low = best.lower_bound
    for _ in range(LIST_PROBES):
        if best.bottleneck - low <= best.lower_bound // CLOSE:
            break
        limit = (low + best.bottleneck - 1) // 2
        high = best.bottleneck
        best = best.with_orders(dag, stages, list_schedules(dag, limit, tails))
        if best.bottleneck == high:
            low = limit + 1
    return best


def _try_beams(
    best: OrderSearchResult, ends: _BothEnds, backward: bool, width: int
) -> OrderSearchResult:
    """Run beam searches for limits between the bound and the best cut."""
    low = best.lower_bound
    while best.bottleneck - low > best.lower_bound // CLOSE and best.steps < WORK:
        limit, high = (low + best.bottleneck - 1) // 2, best.bottleneck
        best, _ = ends.search(best, limit, backward, width)
        if best.bottleneck == high:
            low = limit + 1
    return best


def _search_exhaustively(best: OrderSearchResult, ends: _BothEnds, steps: int) -> OrderSearchResult:
    """Search for anything better than the best cut; if that is too much, refute lower limits."""
    limit = best.bottleneck - 1
    while best.lower_bound <= limit and best.steps < WORK:
        best, decided = ends.search(best, limit, False, None, steps)
        if not decided:
            best, decided = ends.search(best, limit, True, None, steps)
        if decided:
            limit = min(best.bottleneck - 1, (limit + best.bottleneck) // 2)
        elif limit - best.lower_bound > best.lower_bound // CLOSE:
            limit = (best.lower_bound + limit) // 2
        else:
            break
    return best


def _reversed_order(order: Sequence[int]) -> tuple[int, ...]:
    """An order of the reversed graph as one of the graph."""
    return tuple(len(order) - 1 - v for v in reversed(order))
