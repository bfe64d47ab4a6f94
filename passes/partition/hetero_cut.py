"""The exact cut of items in a row over devices that differ, with what crosses its boundaries.

Any beginning of a run that fits a device fits it too, so a stage that starts at item i may end at
every position up to some reach(i): of several ways to run a stage, that of the one that reaches
furthest within the time and its limit of bytes. So the cut and the ways are chosen at once. A run
that starts later may have more to fetch, so reach need not grow with i. For a limit T of the
stages' times the cuts are found stage by stage, from the last one on: of all ends within the reach
the one of least crossing, in a stack of minima. Only starts are looked at from which both ends of
the row could be reached if nothing were fetched: near the optimum these are few, so a search takes
about O(N), not O(N K).

The optimum is the least T for which there is a cut: bisection, in which each search that finds
nothing tells the next T at which any reach grows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from autopipe.errors import PartitionError

from .device_loads import Loads
from .stage_reach import Ways, ways_of


def cut_on(
    loads: Loads, crossing: Sequence[int] | None = None, slack: float = 0.0
) -> tuple[int, ...]:
    """Cut N items in a row into a stage of at least one item for each device. Exact.

    (Over the cuts and the rows that their stages may take.)

    Among the cuts whose largest stage is at most (1 + slack) times the least possible, one with the
    least sum of `crossing` is taken; among those, one whose largest stage is within 1/1024 of the
    optimum of the least possible; among those, the one whose positions come first.

    Args:
        loads: N items on K devices.
        crossing: N + 1 costs >= 0 of a boundary at each position; the ends are ignored.
        slack: how much of the least largest stage time may be given for less crossing.

    Returns:
        The K - 1 items at which stages 1..K-1 start, increasing.

    Raises:
        PartitionError: no cut keeps the devices' limits; it names a stage, and says how many bytes
            are missing there.
    """
    rows = ways_of(loads)
    starts, high = _optimum(loads, rows)
    if crossing is None:
        return tuple(starts)

    def weight(limit: int) -> int:
        return sum(crossing[p] for p in search(limit))

    def search(limit: int) -> list[int]:
        return _least(rows, limit, crossing).starts or starts

    widest = max(high, min(math.floor(high * (1 + Fraction(slack))), max(r.most for r in rows)))
    least = weight(widest)
    limits = range(high, widest, high // 1024 + 1)
    tight = bisect_left(limits, True, key=lambda limit: weight(limit) == least)
    return tuple(search([*limits[tight : tight + 1], widest][0]))


def has_cut(loads: Loads, limit: int) -> bool:
    """Whether some cut keeps the devices' limits, and all its stages a time."""
    return _least(ways_of(loads), limit, [0] * (len(loads.times[0]) + 1)).starts is not None


def _optimum(loads: Loads, rows: Sequence[Ways]) -> tuple[list[int], int]:
    """A cut whose largest stage is as small as can be, and its time."""
    nothing, end = [0] * (rows[0].items + 1), max(row.most for row in rows)
    limit = low = _filled(rows, end)
    step = max(1, low >> 10)
    while (found := _least(rows, limit, nothing)).starts is None:
        if limit >= end:
            raise _does_not_fit(loads, rows, end)
        low = found.beyond
        limit = min(end, max(low, limit + step))
        step *= 4
    starts = found.starts
    high = max(loads.stage_times(starts))
    while low < high:
        found = _least(rows, (low + high) // 2, nothing)
        if found.starts is None:
            low = found.beyond
        else:
            starts = found.starts
            high = max(loads.stage_times(starts))
    return starts, high


def _filled(rows: Sequence[Ways], high: int) -> int:
    """The least time within which stages filled from the left hold all.

    (If stages may be empty and nothing is fetched: no cut has a smaller largest stage.)
    """
    low, N = 0, rows[0].items
    while low < high:
        limit = (low + high) // 2
        at, beyond = 0, high
        for row in rows:
            to = row.far(at, limit)
            if to < N and (grown := row.beyond(at, to + 1, limit, alone=True)) is not None:
                beyond = min(beyond, grown)
            at = to
        if at == N:
            high = limit
        else:
            low = max(beyond, limit + 1)
    return high


class _Found(NamedTuple):
    """Where stages 1..K-1 start, or None; then `beyond` is the least time that may change that."""

    starts: list[int] | None
    beyond: int


def _windows(rows: Sequence[Ways], limit: int) -> tuple[list[int], list[int], int]:
    """Between which items each stage starts (the last entry: the end), and when that may change.

    From an item out of its window one of the ends could not be reached, even if nothing had to be
    fetched.
    """
    K, N = len(rows), rows[0].items
    low, high = [N], [0]
    beyond: list[int | None] = []
    for k, row in enumerate(rows[:-1]):
        to = row.far(high[-1], limit)
        if to < N:
            beyond.append(row.beyond(high[-1], to + 1, limit, alone=True))
        high.append(min(to, N - (K - 1 - k)))
    for k in range(K - 1, -1, -1):
        start = rows[k].near(low[-1], limit)
        if start:
            beyond.append(rows[k].beyond(start - 1, low[-1], limit, alone=True))
        low.append(max(start, k))
    return low[::-1], [*high, N], min((t for t in beyond if t is not None), default=limit + 1)


def _least(rows: Sequence[Ways], limit: int, weights: Sequence[int]) -> _Found:
    """The cut of least weight whose stages are all within a limit; the first of several.

    `least[i]` is the weight of cutting items i.. into the stages from k on. Ends of stage k whose
    weight is less than that of all nearer ends are in a stack, the nearest on top: so the best end
    within a reach is found by bisection.
    """
    N = rows[0].items
    low, high, beyond = _windows(rows, limit)
    known: dict[int, dict[int, int]] = {id(row): {} for row in rows}
    least: list[int | None] = [0]
    choices: list[list[int]] = []
    for k in range(len(rows) - 1, -1, -1):
        row, reach = rows[k], known[id(rows[k])]
        ends: list[int] = []  # negative, so that they ascend
        minima: list[int] = []
        longer: list[int | None] = []
        choice: list[int] = []
        end, nearest = high[k + 1], low[k + 1]
        for start in range(high[k], low[k] - 1, -1):
            while end > start and end >= nearest:
                if (rest := least[end - nearest]) is not None:
                    weight = rest + (weights[end] if end < N else 0)
                    while minima and minima[-1] >= weight:
                        minima.pop()
                        ends.pop()
                    minima.append(weight)
                    ends.append(-end)
                end -= 1
            if start not in reach:
                reach[start] = row.reach(start, limit)
            at = bisect_left(ends, -reach[start])
            longer.append(minima[at] if at < len(ends) else None)
            choice.append(-ends[at] if at < len(ends) else 0)
        least = longer[::-1]
        choices.append(choice[::-1])
        if all(rest is None for rest in least):
            return _Found(None, _grown(rows, known, limit, beyond))
    starts = [0]
    for k, choice in enumerate(reversed(choices)):
        starts.append(choice[starts[-1] - low[k]])
    return _Found(starts[1:-1], limit)


def _grown(rows: Sequence[Ways], known: dict[int, dict[int, int]], limit: int, beyond: int) -> int:
    """The least time above a limit at which some stage reaches further; `beyond` is another."""
    times: list[int | None] = [beyond] if beyond > limit else []
    for row in {id(row): row for row in rows}.values():
        pairs = [(start, stop) for start, stop in known[id(row)].items() if stop < row.items]
        times += [row.beyond(start, stop + 1, limit, alone=False) for start, stop in pairs]
    return min((time for time in times if time is not None), default=limit + 1)


def _does_not_fit(loads: Loads, rows: Sequence[Ways], end: int) -> PartitionError:
    """Which stage, and how much is missing there, when stages are filled one after the other."""
    N, K, at = len(loads.times[0]), len(rows), 0
    for k, row in enumerate(rows):
        last = k == K - 1
        to = row.reach(at, end)
        to = to if last else min(to, N - (K - 1 - k))  # the stages after this one need items
        if to == at or (last and to < N):
            stop = N if last else at + 1
            needs = [
                (-(-(way.bytes(at, stop) - way.limit) // way.grain), way.limit // way.grain)
                for way in row.rows
                if way.limit is not None
            ]
            missing, have = min(needs)
            what = f"items {at} to {stop - 1} of {N}"
            if loads.names:
                what = f"calls {loads.names[at]} to {loads.names[stop - 1]}"
            return PartitionError(
                f"stage {k} does not fit its device: {missing} bytes are missing",
                expected=f"{have + missing} bytes for {what}",
                found=f"{have} bytes",
                remedy="give that stage more memory, keep fewer micro-batches in flight, or use "
                "more devices",
            )
        at = to
    raise AssertionError("filling found a cut that the search did not")
