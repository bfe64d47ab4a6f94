"""Several stages per device: of the cuts with no large stage, one that loads the devices evenly.

A step's steady part is as slow as its busiest device, and a device runs all of its stages for each
micro-batch. If few items are cut into many stages (8 layers into 6 stages on 3 devices), cuts with
the same largest stage load the devices very differently. A local search moves borders: not exact,
and never worse than the cut that it starts from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from .device_loads import DeviceLoads

MOST_MOVES = 1 << 14
"""Cuts that are tried, over all rounds."""

_Key = tuple[int, int, int, int]


def balance_devices(
    loads: DeviceLoads,
    starts: Sequence[int],
    homes: Sequence[int],
    *,
    limit: int,
    crossing: Sequence[int],
    near: float,
) -> tuple[int, ...]:
    """Move the borders of stages so that the busiest device has less to do.

    Args:
        loads: N items in K stages.
        starts: the K - 1 items at which stages 1..K-1 start.
        homes: the device of each stage.
        limit: no stage may take longer, in the unit of `loads`.
        crossing: N + 1 costs >= 0 of a border at each position. Less is better among cuts that load
            the devices alike.
        near: fraction above the mean device at which the busiest one is good enough.

    Returns:
        The starts, increasing; those given if the devices are even or no move helps.
    """
    devices, best = 1 + max(homes), tuple(starts)
    now = _key(loads, best, homes, limit, crossing)
    moves_left = MOST_MOVES
    while moves_left > 0 and now[1] * devices > sum(loads.stage_times(best)) * (1 + near):
        found = best
        for moved in _moved(best, len(crossing) - 1):
            moves_left -= 1
            key = _key(loads, moved, homes, limit, crossing)
            if key < now and loads.fits(moved):
                found, now = moved, key
        if found == best:
            break
        best = found
    return best


def _key(
    loads: DeviceLoads,
    starts: Sequence[int],
    homes: Sequence[int],
    limit: int,
    crossing: Sequence[int],
) -> _Key:
    """What is to be small, in this order: time above the limit, the busiest device, unevenness, and
    crossing."""
    times = loads.stage_times(starts)
    busy = [0] * (1 + max(homes))
    for home, time in zip(homes, times, strict=True):
        busy[home] += time
    above = max(0, max(times) - limit)
    return above, max(busy), sum(time * time for time in busy), sum(crossing[p] for p in starts)


def _moved(starts: tuple[int, ...], items: int) -> Iterator[tuple[int, ...]]:
    """The cuts in which some neighbouring borders are moved by the same number of items.

    (Moving several passes an item on from a stage to one that is not its neighbour.)
    """
    for first in range(len(starts)):
        for last in range(first, len(starts)):
            step = 1
            while step <= items // (len(starts) + 1) + 1:
                for by in (-step, step):
                    middle = tuple(p + by for p in starts[first : last + 1])
                    moved = (*starts[:first], *middle, *starts[last + 1 :])
                    if all(a < b for a, b in pairwise((0, *moved, items))):
                        yield moved
                step *= 2
