"""Assign ops to stages: the exact cut of the captured order, or of a better one.

The captured order is used if its best cut is near the lower bound on all convex cuts: the program
is easier to read, and gradients are summed in the captured order. Otherwise other orders are
searched (`search_orders`), each is cut exactly for its stages' costs, and the best one is used if
it is better by more than `SLACK`. Where the user lists the modules with which stages start, the
captured order is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from torch import Tensor

from autopipe.errors import PartitionError
from autopipe.passes.partition import (
    alternative_orders,
    balance_devices,
    crossing_at,
    cut_for_devices,
    has_cut_within,
    min_bottleneck,
    search_orders,
)

from .allowed_cuts import module_calls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from autopipe.passes.partition import DeviceLoads

    from .op_groups import OpGroups
    from .stage_loads import OrderedOps

SLACK = 0.03
"""How far a cut's bottleneck may be above the optimum if fewer bytes cross the cut, or as many and
it is within fewer modules. Costs are not known more precisely, and a cut between layers saves
memory and is easier to read."""

ORDERED_GROUPS = 4096
"""Graphs with more groups are cut in the captured order only."""

ORDER_STEPS = 1 << 17
"""Budget for cutting orders, in groups; at least one order is cut."""


@dataclass(frozen=True)
class StageAssignment:
    """The chosen cut.

    Attributes:
        stage_of: the stage of each op.
        lower_bound: seconds; the largest stage of every convex cut takes at least that.
    """

    stage_of: dict[fx.Node, int]
    lower_bound: float


def assign_stages(groups: OpGroups) -> StageAssignment:
    """Find the cut with the least bottleneck; among nearly equal ones, that with fewest bytes sent.

    Of several such cuts, the one within fewest modules is chosen.

    Args:
        groups: the ops, with their costs and the objective.

    Raises:
        PartitionError: no cut satisfies the objective's limits; the error is that of the captured
            order.
    """
    ordered, captured = groups.in_order(), range(len(groups.starts))
    loads = ordered.loads()
    low = loads.lower_bound
    best: list[tuple[int, Sequence[int], OrderedOps]] = []
    failed = None
    try:
        best.append((_largest(loads), captured, ordered))
    except PartitionError as error:
        failed = error
    near = best and best[0][0] <= low * (1 + SLACK)
    fixed = groups.costs.objective.cut_at.starts is not None or len(captured) > ORDERED_GROUPS
    if not near and not fixed:
        low, orders = _orders(groups, loads)
        high = best[0][0] if best else None
        if high is None or high > low * (1 + SLACK):
            for order in orders:
                if (found := _better_cut(groups, order, high)) is not None:
                    best.append(found)
                    high = found[0]
    if not best:
        assert failed is not None
        raise failed
    least = min(found[0] for found in best)
    _, chosen, ordered = next(found for found in best if found[0] <= least * (1 + SLACK))
    starts = _cut_evenly(ordered, math.floor(least * (1 + SLACK)))
    return StageAssignment(groups.stage_of(chosen, starts), float(low * loads.unit))


def _cut_evenly(ordered: OrderedOps, limit: int) -> tuple[int, ...]:
    """The cut with the least crossing; where devices have several stages, one that loads them
    evenly, if it has no stage above the limit."""
    loads, crossing = ordered.loads(), _crossing(ordered)
    starts, homes = cut_for_devices(loads, crossing, SLACK), ordered.costs.objective.homes
    if len(set(homes)) == len(homes):
        return starts
    limit = max(limit, *loads.stage_times(starts))
    return balance_devices(loads, starts, homes, limit=limit, crossing=crossing, near=SLACK)


def _largest(loads: DeviceLoads) -> int:
    """Time of the largest stage of the best cut."""
    return max(loads.stage_times(cut_for_devices(loads)))


def _orders(groups: OpGroups, loads: DeviceLoads) -> tuple[int, list[tuple[int, ...]]]:
    """A lower bound on all convex cuts, and orders that may have a good one."""
    K, N = len(loads.min_times), len(groups.starts)
    rows = list({id(row): row for row in loads.min_times}.values())
    costs = [min(column) for column in zip(*rows, strict=True)]
    dag = groups.dag(costs)
    if not any(costs):
        return loads.lower_bound, []
    low, high, found = loads.lower_bound, min_bottleneck(list(accumulate(costs, initial=0)), K), []
    if high > low * (1 + SLACK):  # otherwise transfers, not the order, limit the cut
        searched = search_orders(dag, K)
        low, high = max(low, searched.lower_bound), searched.bottleneck
        found = [*reversed(searched.orders[1:])]
    found += alternative_orders(dag, K, high)
    return low, found[: max(1, ORDER_STEPS // N)]


def _better_cut(
    groups: OpGroups, order: Sequence[int], high: int | None
) -> tuple[int, Sequence[int], OrderedOps] | None:
    """The best cut of an order, if it is better than `high` by more than the slack."""
    ordered = groups.in_order(order)
    loads = ordered.loads()
    if high is not None:
        wanted = math.ceil(high / (1 + SLACK)) - 1
        return (_largest(loads), order, ordered) if has_cut_within(loads, wanted) else None
    try:
        return _largest(loads), order, ordered
    except PartitionError:
        return None


def _crossing(ordered: OrderedOps) -> list[int]:
    """What crosses each position 0..N of the groups: bytes of tensors, then calls of modules.

    (Of two cuts that as many bytes cross, the one within fewer modules has the least sum.)
    """
    group_of = ordered.group_of
    groups = list(group_of.values())
    calls = module_calls(ordered.ops).values()
    within = crossing_at(
        ((1, groups[call.first], groups[call.last]) for call in calls), len(ordered.starts)
    )
    more = 1 + sum(sorted(within)[-ordered.costs.objective.stages :])
    lifetimes = []
    for node, group in group_of.items():
        if isinstance(node.meta.get("val"), Tensor):
            last = max((group_of[u] for u in node.users if u in group_of), default=group)
            if last > group:
                lifetimes.append((ordered.costs.nbytes(node), group, last))
    nbytes = crossing_at(lifetimes, len(ordered.starts))
    return [n * more + calls for n, calls in zip(nbytes, within, strict=True)]
