"""Cut N items in a row into K stages so that the largest stage is as small as possible.

Exact, on integers. This is the cut for equal devices. With a second criterion (`crossing`) it calls
the cut for different devices (`hetero_cut`) with K equal ones.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from autopipe.errors import OptionError, PartitionError

from .device_loads import DeviceLoads
from .hetero_cut import cut_for_devices
from .scaled_integers import to_integers


def cut_chain(
    seconds: Sequence[float],
    stages: int,
    *,
    crossing: Sequence[float] | None = None,
    slack: float | Fraction = 0.0,
) -> tuple[int, ...]:
    """Cut N items in a row into K stages of at least one item; the largest stage is minimal.

    Position p, 1 <= p < N, is the boundary before item p. Without `crossing`, stages are filled
    from the left. With it, see `hetero_cut.cut_for_devices` for the choice among the cuts within
    the slack.

    Args:
        seconds: N costs, finite and >= 0.
        stages: K.
        crossing: N + 1 finite costs >= 0 of a boundary at each position; entries 0 and N are
            ignored.
        slack: how far the largest stage may be above the optimum, as a fraction of it, for less
            crossing.

    Returns:
        The K - 1 items, increasing, at which stages 1..K-1 start.

    Raises:
        OptionError: `stages` < 1, an argument of the wrong length, or an invalid cost or slack.
        PartitionError: more stages than items.
    """
    N = len(seconds)
    if stages < 1:
        raise OptionError("too few stages", expected="stages >= 1", found=str(stages))
    if crossing is not None and len(crossing) != N + 1:
        wanted = f"{N + 1} entries, one for each position 0..{N}"
        raise OptionError("`crossing`", expected=wanted, found=f"{len(crossing)}")
    if not 0 <= slack < math.inf:
        raise OptionError("`slack`", expected="a finite fraction >= 0", found=str(slack))
    if stages > N:
        raise PartitionError(
            f"{stages} stages requested, {N} possible",
            expected="at least one item in each stage",
            found=f"{N} items",
            remedy=f"use at most {N} stages" if N else None,
        )
    costs = to_integers("seconds", seconds)
    if crossing is None:
        prefix = list(accumulate(costs, initial=0))
        return tuple(fill_stages(prefix, stages, min_bottleneck(prefix, stages)))
    weights = [0, *to_integers("crossing", crossing[1:-1]), 0]
    return cut_for_devices(DeviceLoads.of_equal_devices(costs, stages), weights, slack)


def min_bottleneck(prefix: Sequence[int], K: int) -> int:
    """The smallest limit such that filling stages from the left needs at most K of them.

    Exact bisection: each probe moves a bound to the next value that changes the result, so `high`
    is always the largest stage of a real cut and no cut is below `low`.

    Args:
        prefix: N + 1 prefix sums of the costs, the first 0.
        K: the number of stages.
    """
    end, high = len(prefix) - 1, prefix[-1]
    low = max(-(-high // K), *(b - a for a, b in pairwise(prefix)))
    while low < high:
        limit = (low + high) // 2
        start, largest, next_limit = 0, 0, high
        for _ in range(K):
            stop = bisect_right(prefix, prefix[start] + limit) - 1
            largest = max(largest, prefix[stop] - prefix[start])
            if stop == end:
                high = largest
                break
            next_limit = min(next_limit, prefix[stop + 1] - prefix[start])
            start = stop
        else:
            low = next_limit
    return high


def fill_stages(prefix: Sequence[int], K: int, limit: int) -> list[int]:
    """Fill K stages up to a limit from the left, leaving at least one item for each later stage.

    Args:
        prefix: N + 1 prefix sums of the costs, the first 0.
        K: the number of stages.
        limit: at least `min_bottleneck`.

    Returns:
        The items at which stages 1..K-1 start.
    """
    end, starts = len(prefix) - 1, [0]
    for left in range(K - 1, 0, -1):
        stop = bisect_right(prefix, prefix[starts[-1]] + limit) - 1
        starts.append(min(stop, end - left))
    return starts[1:]
