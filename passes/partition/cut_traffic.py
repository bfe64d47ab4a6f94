"""The second criterion: among cuts whose largest stage is within a limit, few bytes that cross.

A value crosses each boundary between the stage that makes it and the last one that uses it. For one
order `chain_cut.cut` has the exact least; over orders this is a local search: the cut is moved
node by
node, its nodes are brought into an order in which each stage is a run again, and that is cut anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate

from .chain_cut import bottleneck, cut, fill
from .dag import Dag

CUT_STEPS = 1 << 22
"""Positions times stages for which all exact cuts together are sought, per graph."""

MOVE_STEPS = 1 << 21
"""Edges that all moves of nodes look at, per graph."""

RECUTS = 3
"""How often an improved cut is brought into an order and cut again, per order."""


def crossing_bytes(dag: Dag, nbytes: Sequence[int], stage_of: Sequence[int]) -> int:
    """The sum, over the boundaries between stages, of the bytes that cross there."""
    return sum(
        size * (max(stage_of[u] for u in users) - stage_of[v])
        for v, (size, users) in enumerate(zip(nbytes, dag.after, strict=True))
        if users
    )


def least_crossing(
    dag: Dag, nbytes: Sequence[int], orders: Sequence[Sequence[int]], stages: int, limit: int
) -> list[int]:
    """The stage of each node in the best cut found whose stages are all within `limit`.

    Args:
        dag: N nodes.
        nbytes: the size of each node's value; all 0 where sizes are not known.
        orders: topological orders; at least one has a cut within `limit`.
        stages: K, 1 <= K <= N.
        limit: of what a stage may cost.
    """
    best: tuple[int, list[int]] | None = None
    steps, moves = (CUT_STEPS, MOVE_STEPS) if any(nbytes) else (0, 0)
    price = len(dag.costs) * stages
    for start in orders:
        order, least = start, None
        for _ in range(RECUTS):
            if best is not None and (best[0] == 0 or steps < price):
                break
            stage_of = _cut(dag, nbytes, order, stages, limit, exact=steps >= price)
            if stage_of is None:
                break
            steps -= price
            moved, moves = _moved(dag, nbytes, stage_of, stages, limit, moves)
            weight = crossing_bytes(dag, nbytes, moved)
            if best is None or weight < best[0]:
                best = weight, moved
            if least is not None and weight >= least:
                break
            least, order = weight, sorted(range(len(moved)), key=lambda v: (moved[v], v))
    assert best is not None
    return best[1]


def _cut(
    dag: Dag,
    nbytes: Sequence[int],
    order: Sequence[int],
    stages: int,
    limit: int,
    exact: bool,
) -> list[int] | None:
    """The cut of an order with the least crossing, or any, within the limit; None if none is."""
    costs = [dag.costs[v] for v in order]
    prefix = list(accumulate(costs, initial=0))
    if (least := bottleneck(prefix, stages)) > limit:
        return None
    if exact:
        slack = Fraction(limit, least) - 1 if least else Fraction(0)
        starts = cut(costs, stages, crossing=crossing_at(dag, nbytes, order), slack=slack)
    else:
        starts = tuple(fill(prefix, stages, limit))
    stage_of = [0] * len(order)
    for at, v in enumerate(order):
        stage_of[v] = bisect_right(starts, at)
    return stage_of


def crossing_at(dag: Dag, nbytes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Bytes alive across each position 0..N of the order: made before it, used at or after it."""
    place = [0] * len(order)
    for at, v in enumerate(order):
        place[v] = at
    change = [0] * (len(order) + 2)
    for v, size in enumerate(nbytes):
        change[place[v] + 1] += size
        change[max((place[u] for u in dag.after[v]), default=place[v]) + 1] -= size
    return list(accumulate(change))[: len(order) + 1]


def _moved(
    dag: Dag, nbytes: Sequence[int], stage_of: Sequence[int], stages: int, limit: int, steps: int
) -> tuple[list[int], int]:
    """The cut after moves of single nodes, each of which lessens what crosses, until none does.

    Also what is left of the steps; without any the cut stays as it is.
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
            used = []  # of each value that v uses: bytes, last stage that needs it but for v
            for p in dag.before[v]:
                steps -= len(dag.after[p])
                others = (stage[u] if u != v else stage[p] for u in dag.after[p])
                used.append((nbytes[p], max(others) if steps >= 0 else 0))
            if steps < 0:
                return stage, steps
            made = nbytes[v] if dag.after[v] else 0
            weight = partial(_weight, made, used)
            fits = [k for k in range(first, last + 1) if k == here or load[k] + cost <= limit]
            to = min(fits, key=weight)
            if weight(to) < weight(here):
                stage[v], changed = to, True
                load[here] -= cost
                load[to] += cost
                count[here] -= 1
                count[to] += 1
    return stage, steps


def _weight(made: int, used: Sequence[tuple[int, int]], k: int) -> int:
    """Bytes over boundaries because of a node in stage k, up to a constant."""
    return sum(size * max(other, k) for size, other in used) - made * k
