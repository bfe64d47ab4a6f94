"""The second criterion: among cuts whose largest stage is within a limit, few bytes that cross.

A value crosses every boundary between the stage that computes it and the last one that uses it. For
one order `chain_cut.cut_chain` finds the exact minimum. Over orders this is a local search: nodes
of the cut are moved one by one; then the nodes are sorted so that each stage is contiguous again,
and that order is cut again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate

from .chain_cut import cut_chain, fill_stages, min_bottleneck
from .dag import Dag

CUT_STEPS = 1 << 22
"""Budget for all exact cuts of one graph, in positions times stages."""

MOVE_STEPS = 1 << 21
"""Budget for all moves of nodes of one graph, in edges visited."""

RECUTS = 3
"""How often an improved cut is sorted and cut again, per order."""


def crossing_at(lifetimes: Iterable[tuple[int, int, int]], items: int) -> list[int]:
    """Bytes alive across each position of a row of items: computed before it, used at or after it.

    Args:
        lifetimes: for each value its bytes, the item that computes it, and the last item that uses
            it (the same item if none does).
        items: N.

    Returns:
        N + 1 sums, for positions 0..N.
    """
    change = [0] * (items + 2)
    for nbytes, producer, last_use in lifetimes:
        change[producer + 1] += nbytes
        change[last_use + 1] -= nbytes
    return list(accumulate(change))[: items + 1]


def crossing_at_order(dag: Dag, nbytes: Sequence[int], order: Sequence[int]) -> list[int]:
    """`crossing_at` for the nodes of a graph in a topological order.

    Args:
        dag: N nodes.
        nbytes: the size of each node's value.
        order: of the nodes.
    """
    position = [0] * len(order)
    for at, v in enumerate(order):
        position[v] = at
    lifetimes = (
        (size, position[v], max((position[u] for u in dag.after[v]), default=position[v]))
        for v, size in enumerate(nbytes)
    )
    return crossing_at(lifetimes, len(order))


def crossing_bytes(dag: Dag, nbytes: Sequence[int], stage_of: Sequence[int]) -> int:
    """The sum, over the boundaries between stages, of the bytes that cross there.

    Args:
        dag: N nodes.
        nbytes: the size of each node's value.
        stage_of: the stage of each node.
    """
    return sum(
        size * (max(stage_of[u] for u in users) - stage_of[v])
        for v, (size, users) in enumerate(zip(nbytes, dag.after, strict=True))
        if users
    )


def minimize_crossing(
    dag: Dag, nbytes: Sequence[int], orders: Sequence[Sequence[int]], stages: int, limit: int
) -> list[int]:
    """The stage of each node in the best cut found whose stages are all within `limit`.

    Args:
        dag: N nodes.
        nbytes: the size of each node's value; all 0 where sizes are not known.
        orders: topological orders; at least one has a cut within `limit`.
        stages: K, 1 <= K <= N.
        limit: on the cost of a stage.
    """
    best: tuple[int, list[int]] | None = None
    steps, moves = (CUT_STEPS, MOVE_STEPS) if any(nbytes) else (0, 0)
    price = len(dag.costs) * stages
    for start in orders:
        order, least = start, None
        for _ in range(RECUTS):
            if best is not None and (best[0] == 0 or steps < price):
                break
            stage_of = _cut_order(dag, nbytes, order, stages, limit, exact=steps >= price)
            if stage_of is None:
                break
            steps -= price
            moved, moves = _move_nodes(dag, nbytes, stage_of, stages, limit, moves)
            weight = crossing_bytes(dag, nbytes, moved)
            if best is None or weight < best[0]:
                best = weight, moved
            if least is not None and weight >= least:
                break
            least, order = weight, sorted(range(len(moved)), key=lambda v: (moved[v], v))
    assert best is not None
    return best[1]


def _cut_order(
    dag: Dag,
    nbytes: Sequence[int],
    order: Sequence[int],
    stages: int,
    limit: int,
    exact: bool,
) -> list[int] | None:
    """The cut of an order within the limit with the least crossing, or any; None: there is none."""
    costs = [dag.costs[v] for v in order]
    prefix = list(accumulate(costs, initial=0))
    if (least := min_bottleneck(prefix, stages)) > limit:
        return None
    if exact:
        slack = Fraction(limit, least) - 1 if least else Fraction(0)
        crossing = crossing_at_order(dag, nbytes, order)
        starts = cut_chain(costs, stages, crossing=crossing, slack=slack)
    else:
        starts = tuple(fill_stages(prefix, stages, limit))
    stage_of = [0] * len(order)
    for at, v in enumerate(order):
        stage_of[v] = bisect_right(starts, at)
    return stage_of


def _move_nodes(
    dag: Dag, nbytes: Sequence[int], stage_of: Sequence[int], stages: int, limit: int, steps: int
) -> tuple[list[int], int]:
    """Move single nodes to other stages as long as a move reduces the crossing.

    Also returns the steps that are left; without steps the cut stays as it is.
    """
    stage = list(stage_of)
    load, count = [0] * stages, [0] * stages
    for v, k in enumerate(stage):
        load[k] += dag.costs[v]
        count[k] += 1
    changed = steps > 0
    while changed:
        changed = False
        for v, cost in enumerate(dag.costs):
            here = stage[v]
            first = max((stage[p] for p in dag.before[v]), default=0)
            last = min((stage[u] for u in dag.after[v]), default=stages - 1)
            if first == last or count[here] == 1:
                continue
            steps -= last - first + len(dag.before[v]) + len(dag.after[v])
            inputs = []  # of each value that v uses: bytes, last stage that needs it apart from v
            for p in dag.before[v]:
                steps -= len(dag.after[p])
                others = (stage[u] if u != v else stage[p] for u in dag.after[p])
                inputs.append((nbytes[p], max(others) if steps >= 0 else 0))
            if steps < 0:
                return stage, steps
            own = nbytes[v] if dag.after[v] else 0
            weight = partial(_node_crossing, own, inputs)
            fits = [k for k in range(first, last + 1) if k == here or load[k] + cost <= limit]
            to = min(fits, key=weight)
            if weight(to) < weight(here):
                stage[v], changed = to, True
                load[here] -= cost
                load[to] += cost
                count[here] -= 1
                count[to] += 1
    return stage, steps


def _node_crossing(own: int, inputs: Sequence[tuple[int, int]], k: int) -> int:
    """Bytes across boundaries due to a node in stage k, up to a constant."""
    return sum(size * max(other, k) for size, other in inputs) - own * k
