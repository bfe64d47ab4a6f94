"""Calls and an aim → the stage of each call: the exact cut of the captured order, or a better one.

The captured order is kept where its best cut is near the bound on all convex cuts: it reads better,
and gradients are summed in it. Else other orders are searched (`solve`), each is cut exactly for
what stages really take (`contiguous`), and one is taken if it is better by more than `SLACK`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from autopipe.errors import PartitionError
from autopipe.passes.graph import is_size
from autopipe.passes.partition import Dag, alternatives, bottleneck, cut_on, has_cut, solve

from .stage_loads import Rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import fx

    from autopipe.passes.partition import Loads

    from .call_costs import CallCosts

SLACK = 0.03
"""How far above the least possible bottleneck a cut may lie if fewer bytes cross it. Costs are not
known better than that, and a cut between layers saves memory and reads better."""

ORDERED_ITEMS = 4096
"""Graphs with more items are cut in the captured order."""

ORDER_STEPS = 1 << 17
"""Items for which orders are cut; one order always is."""


@dataclass(frozen=True)
class CutChoice:
    """A cut.

    Attributes:
        stage_of: for each call.
        lower_bound: seconds that the largest stage of no convex cut is below.
    """

    stage_of: dict[fx.Node, int]
    lower_bound: float


@dataclass(frozen=True, eq=False)
class Items:
    """Runs of calls that nothing may part.

    Attributes:
        facts: of the calls, which stand in the captured order.
        starts: the first call of each item.
    """

    facts: CallCosts
    starts: Sequence[int]

    @property
    def members(self) -> list[list[fx.Node]]:
        """The calls of each item."""
        calls = self.facts.calls
        return [calls[a:b] for a, b in pairwise([*self.starts, len(calls)])]

    def rows(self, order: Iterable[int] | None = None) -> Rows:
        """The items in another order; None: as they stand."""
        if order is None:
            return Rows(self.facts, self.facts.calls, self.starts)
        members = self.members
        parts = [members[item] for item in order]
        starts = list(accumulate((len(part) for part in parts[:-1]), initial=0))
        return Rows(self.facts, [node for part in parts for node in part], starts)

    def dag(self, costs: Sequence[int]) -> Dag:
        """What depends on what; sizes, which stages work out themselves, count as well."""
        item_of = self.rows().item_of
        edges = []
        made: dict[fx.Node, set[int]] = {}  # by size, the items that it is worked out from
        for node in self.facts.annotated.captured.graph_module.graph.nodes:
            sources: set[int] = set()
            for source in node.all_input_nodes:
                sources |= made.get(source, set())
                if source in item_of:
                    sources.add(item_of[source])
            if is_size(node):
                made[node] = sources
            elif node in item_of:
                edges += [(a, item_of[node]) for a in sources if a != item_of[node]]
        return Dag.of(costs, edges)

    def stages(self, order: Sequence[int], starts: Sequence[int]) -> dict[fx.Node, int]:
        """The stage of each call if the items in an order are cut."""
        members = self.members
        bounds = pairwise([0, *starts, len(order)])
        return {
            node: k
            for k, (a, b) in enumerate(bounds)
            for item in order[a:b]
            for node in members[item]
        }


def choose(items: Items) -> CutChoice:
    """The best cut that is found.

    Raises:
        PartitionError: no cut keeps the aim's limits: that of the captured order.
    """
    rows, captured = items.rows(), range(len(items.starts))
    loads = rows.loads()
    low = loads.bound
    best: list[tuple[int, Sequence[int], Rows]] = []
    failed = None
    try:
        best.append((_largest(loads), captured, rows))
    except PartitionError as error:
        failed = error
    near = best and best[0][0] <= low * (1 + SLACK)
    if not near and len(captured) <= ORDERED_ITEMS:
        low, orders = _orders(items, loads)
        high = best[0][0] if best else None
        if high is None or high > low * (1 + SLACK):
            for order in orders:
                if (found := _tried(items, order, high)) is not None:
                    best.append(found)
                    high = found[0]
    if not best:
        assert failed is not None
        raise failed
    least = min(found[0] for found in best)
    _, chosen, rows = next(found for found in best if found[0] <= least * (1 + SLACK))
    starts = cut_on(rows.loads(), crossing_at(rows), SLACK)
    return CutChoice(items.stages(chosen, starts), float(low * loads.unit))


def _largest(loads: Loads) -> int:
    """The largest stage of the best cut."""
    return max(loads.stage_times(cut_on(loads)))


def _orders(items: Items, loads: Loads) -> tuple[int, list[tuple[int, ...]]]:
    """A bound on all convex cuts, and orders that may have a good one."""
    K, N = len(loads.least_times), len(items.starts)
    rows = list({id(row): row for row in loads.least_times}.values())
    costs = [min(column) for column in zip(*rows, strict=True)]
    dag = items.dag(costs)
    if not any(costs):
        return loads.bound, []
    low, high, found = loads.bound, bottleneck(list(accumulate(costs, initial=0)), K), []
    if high > low * (1 + SLACK):  # else what is too much is sent, not computed
        solved = solve(dag, K)
        low, high, found = max(low, solved.low), solved.high, [*reversed(solved.orders[1:])]
    found += alternatives(dag, K, high)
    return low, found[: max(1, ORDER_STEPS // N)]


def _tried(
    items: Items, order: Sequence[int], high: int | None
) -> tuple[int, Sequence[int], Rows] | None:
    """The best cut of an order, if it is better than `high` by more than the slack."""
    rows = items.rows(order)
    loads = rows.loads()
    if high is not None:
        wanted = math.ceil(high / (1 + SLACK)) - 1
        return (_largest(loads), order, rows) if has_cut(loads, wanted) else None
    try:
        return _largest(loads), order, rows
    except PartitionError:
        return None


def crossing_at(rows: Rows) -> list[int]:
    """For each position 0..N of the items: bytes of the tensors made before it and used after."""
    change = [0] * (len(rows.starts) + 2)
    for node, item in rows.item_of.items():
        if isinstance(node.meta.get("val"), Tensor):
            last = max((rows.item_of[u] for u in node.users if u in rows.item_of), default=item)
            if last > item:
                nbytes = rows.facts.nbytes(node)
                change[item + 1] += nbytes
                change[last + 1] -= nbytes
    return list(accumulate(change))[: len(rows.starts) + 1]
