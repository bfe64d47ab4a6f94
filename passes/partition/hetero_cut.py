"""Cut N items in a row over K equal or different devices. Exact.

If a stage fits a device, so does every prefix of it. So a stage that starts at item i may end at
any position up to reach(i), the farthest end of any of its options within the time limit and the
option's memory; the cut and the options are chosen together. A stage that starts later may have
more to receive, so reach(i) need not grow with i.

For a limit T on the stages' times, cuts are searched stage by stage, from the last one: of all ends
within reach, the one with the least crossing, found in a stack of minima. Only those starts are
visited from which both ends of the row could be reached if receiving were free. Near the optimum
these are few, so a search takes about O(N), not O(N K).

The optimum is the smallest T that has a cut, found by bisection; each failed search returns the
next T at which some reach grows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from autopipe.errors import PartitionError

from .device_loads import DeviceLoads
from .stage_reach import StageOptions, options_of_stages


def cut_for_devices(
    loads: DeviceLoads, crossing: Sequence[int] | None = None, slack: float | Fraction = 0.0
) -> tuple[int, ...]:
    """Cut N items into one stage of at least one item for each device; the largest is minimal.

    Exact, over all cuts and all options of their stages. Among the cuts whose largest stage is at
    most (1 + slack) times the optimum, those with the least sum of `crossing` are selected; among
    those, the ones whose largest stage exceeds the least possible by at most 1/1024 of the optimum;
    among those, the one whose positions come first.

    Args:
        loads: N items on K devices.
        crossing: N + 1 costs >= 0 of a boundary at each position; the ends are ignored.
        slack: how far the largest stage may be above the optimum, as a fraction of it, for less
            crossing.

    Returns:
        The K - 1 items at which stages 1..K-1 start, increasing.

    Raises:
        PartitionError: no cut fits the devices' limits; it names a stage, and how many bytes are
            missing there.
    """
    stages = options_of_stages(loads)
    starts, optimum = _optimal_cut(loads, stages)
    if crossing is None:
        return tuple(starts)

    def weight(limit: int) -> int:
        return sum(crossing[p] for p in search(limit))

    def search(limit: int) -> list[int]:
        return _least_crossing_cut(stages, limit, crossing).starts or starts

    most = min(math.floor(optimum * (1 + Fraction(slack))), max(each.max_time for each in stages))
    widest = max(optimum, most)
    least = weight(widest)
    limits = range(optimum, widest, optimum // 1024 + 1)
    tight = bisect_left(limits, True, key=lambda limit: weight(limit) == least)
    return tuple(search([*limits[tight : tight + 1], widest][0]))


def has_cut_within(loads: DeviceLoads, limit: int) -> bool:
    """Whether some cut fits the devices' memory limits with every stage within a time.

    Args:
        loads: N items on K devices.
        limit: a time, in the unit of `loads`.
    """
    no_crossing = [0] * (len(loads.times[0]) + 1)
    return _least_crossing_cut(options_of_stages(loads), limit, no_crossing).starts is not None


def _optimal_cut(loads: DeviceLoads, stages: Sequence[StageOptions]) -> tuple[list[int], int]:
    """A cut with the least bottleneck, and that time."""
    no_crossing, end = [0] * (stages[0].items + 1), max(each.max_time for each in stages)
    limit = low = _min_time_filled(stages, end)
    step = max(1, low >> 10)
    while (found := _least_crossing_cut(stages, limit, no_crossing)).starts is None:
        if limit >= end:
            raise _does_not_fit(loads, stages, end)
        low = found.next_limit
        limit = min(end, max(low, limit + step))
        step *= 4
    starts = found.starts
    high = max(loads.stage_times(starts))
    while low < high:
        found = _least_crossing_cut(stages, (low + high) // 2, no_crossing)
        if found.starts is None:
            low = found.next_limit
        else:
            starts = found.starts
            high = max(loads.stage_times(starts))
    return starts, high


def _min_time_filled(stages: Sequence[StageOptions], high: int) -> int:
    """The smallest time within which stages filled from the left hold all items.

    A lower bound on every cut: here stages may be empty and receiving is free.
    """
    low, N = 0, stages[0].items
    while low < high:
        limit = (low + high) // 2
        at, next_limit = 0, high
        for stage in stages:
            end = stage.farthest_end(at, limit)
            if end < N and (time := stage.next_time(at, end + 1, limit, receive=False)) is not None:
                next_limit = min(next_limit, time)
            at = end
        if at == N:
            high = limit
        else:
            low = max(next_limit, limit + 1)
    return high


class _CutSearch(NamedTuple):
    """The starts of stages 1..K-1, or None; then `next_limit` is the next limit worth trying."""

    starts: list[int] | None
    next_limit: int


def _start_windows(stages: Sequence[StageOptions], limit: int) -> tuple[list[int], list[int], int]:
    """The first and last item at which each stage may start (the last entry: the end of the row).

    From an item outside its window, one end of the row cannot be reached even if receiving is free.
    Also the least larger limit that may change the windows.
    """
    K, N = len(stages), stages[0].items
    first, last = [N], [0]
    times: list[int | None] = []
    for k, stage in enumerate(stages[:-1]):
        end = stage.farthest_end(last[-1], limit)
        if end < N:
            times.append(stage.next_time(last[-1], end + 1, limit, receive=False))
        last.append(min(end, N - (K - 1 - k)))
    for k in range(K - 1, -1, -1):
        start = stages[k].earliest_start(first[-1], limit)
        if start:
            times.append(stages[k].next_time(start - 1, first[-1], limit, receive=False))
        first.append(max(start, k))
    next_limit = min((time for time in times if time is not None), default=limit + 1)
    return first[::-1], [*last, N], next_limit


def _least_crossing_cut(
    stages: Sequence[StageOptions], limit: int, crossing: Sequence[int]
) -> _CutSearch:
    """The cut with the least crossing whose stages are all within a limit; the first of several.

    `least[i]` is the crossing of cutting the items from i into the stages from k on. The ends of
    stage k that have less crossing than every nearer end are on a stack, the nearest on top, so the
    best end within a reach is found by bisection.
    """
    N = stages[0].items
    first, last, next_limit = _start_windows(stages, limit)
    reaches: dict[int, dict[int, int]] = {id(stage): {} for stage in stages}
    least: list[int | None] = [0]
    choices: list[list[int]] = []
    for k in range(len(stages) - 1, -1, -1):
        stage, reach = stages[k], reaches[id(stages[k])]
        ends: list[int] = []  # negated, so that they ascend
        minima: list[int] = []
        with_stage: list[int | None] = []
        choice: list[int] = []
        end, nearest = last[k + 1], first[k + 1]
        for start in range(last[k], first[k] - 1, -1):
            while end > start and end >= nearest:
                if (rest := least[end - nearest]) is not None:
                    weight = rest + (crossing[end] if end < N else 0)
                    while minima and minima[-1] >= weight:
                        minima.pop()
                        ends.pop()
                    minima.append(weight)
                    ends.append(-end)
                end -= 1
            if start not in reach:
                reach[start] = stage.reach(start, limit)
            at = bisect_left(ends, -reach[start])
            with_stage.append(minima[at] if at < len(ends) else None)
            choice.append(-ends[at] if at < len(ends) else 0)
        least = with_stage[::-1]
        choices.append(choice[::-1])
        if all(rest is None for rest in least):
            return _CutSearch(None, _next_limit(stages, reaches, limit, next_limit))
    starts = [0]
    for k, choice in enumerate(reversed(choices)):
        starts.append(choice[starts[-1] - first[k]])
    return _CutSearch(starts[1:-1], limit)


def _next_limit(
    stages: Sequence[StageOptions], reaches: dict[int, dict[int, int]], limit: int, other: int
) -> int:
    """The least time above a limit at which some stage reaches farther; `other` is a candidate."""
    times: list[int | None] = [other] if other > limit else []
    for stage in {id(stage): stage for stage in stages}.values():
        pairs = [(start, end) for start, end in reaches[id(stage)].items() if end < stage.items]
        times += [stage.next_time(start, end + 1, limit, receive=True) for start, end in pairs]
    return min((time for time in times if time is not None), default=limit + 1)


def _does_not_fit(loads: DeviceLoads, stages: Sequence[StageOptions], time: int) -> PartitionError:
    """The first stage that does not fit, and its missing bytes, if stages are filled in turn."""
    N, K, at = len(loads.times[0]), len(stages), 0
    for k, stage in enumerate(stages):
        is_last = k == K - 1
        end = stage.reach(at, time)
        end = end if is_last else min(end, N - (K - 1 - k))  # later stages need items
        if end == at or (is_last and end < N):
            stop = N if is_last else at + 1
            needs = []
            for option in stage.options:
                if (limit := option.byte_limit) is not None:
                    units = option.units_per_byte
                    needs.append((-(-(option.memory(at, stop) - limit) // units), limit // units))
            missing, available = min(needs)
            what = f"items {at} to {stop - 1} of {N}"
            if loads.item_names:
                what = f"ops {loads.item_names[at]} to {loads.item_names[stop - 1]}"
            return PartitionError(
                f"stage {k} does not fit its device: {missing} bytes are missing",
                expected=f"{available + missing} bytes for {what}",
                found=f"{available} bytes",
                remedy="give that stage more memory, keep fewer micro-batches in flight, or use "
                "more devices",
            )
        at = end
    raise AssertionError("filling found a cut that the search did not")
