"""The solver: items in a row, cut into K runs so that the largest run is as small as can be.

Exact, on plain arrays. Floats are scaled to integers without rounding, so that no tolerance decides
what is feasible.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from autopipe.errors import OptionError, PartitionError


def cut(
    seconds: Sequence[float],
    stages: int,
    *,
    allowed: Sequence[bool] | None = None,
    crossing: Sequence[float] | None = None,
    slack: float | Fraction = 0.0,
) -> tuple[int, ...]:
    """Cut N items in a row into K stages of at least one item, the largest as small as can be.

    Position p, 1 <= p < N, is the boundary before item p. The optimum is exact (see the module).
    Among the cuts whose largest stage is at most (1 + slack) times it, one with the least sum of
    `crossing` is taken; among those, one whose largest stage is within 1/1024 of the optimum of the
    least possible; among those, the one whose positions come first. Without `crossing` stages are
    filled from the left. O(N) for the optimum, O(N K) a probe for the second criterion.

    Args:
        seconds: N costs, finite and >= 0.
        stages: K.
        allowed: N + 1 flags: may a stage start here? Entries 0 and N are ignored. None: anywhere.
        crossing: N + 1 finite costs >= 0 of a boundary here. Entries 0 and N are ignored.
        slack: how much of the optimum may be given for less crossing, a fraction >= 0.

    Returns:
        The K - 1 items, increasing, at which stages 1..K-1 start.

    Raises:
        OptionError: `stages` < 1, an argument of the wrong length, or a value that is no cost.
        PartitionError: more stages than the allowed positions make possible.
    """
    N = len(seconds)
    if stages < 1:
        raise OptionError("there is no such pipeline", expected="stages >= 1", found=str(stages))
    for what, length in (("allowed", allowed), ("crossing", crossing)):
        if length is not None and len(length) != N + 1:
            wanted = f"{N + 1} entries, one for each position 0..{N}"
            raise OptionError(f"`{what}`", expected=wanted, found=f"{len(length)}")
    if not 0 <= slack < math.inf:
        raise OptionError("`slack`", expected="a finite fraction >= 0", found=str(slack))
    inner = [p for p in range(1, N) if allowed is None or allowed[p]]
    if stages > (possible := min(N, len(inner) + 1)):
        raise PartitionError(
            f"{stages} stages asked for, {possible} possible",
            expected="at least one item in each stage, and cuts only where they are allowed",
            found=f"{N} items, {len(inner)} positions to cut at",
            remedy=f"ask for at most {possible} stages" if possible else None,
        )
    # From here on everything is integers, and items that no position parts are one block.
    at = [0, *inner, N]
    sums = list(accumulate(integers("seconds", seconds), initial=0))
    prefix = [sums[p] for p in at]
    limit = bottleneck(prefix, stages)
    if crossing is None:
        return tuple(at[block] for block in fill(prefix, stages, limit))
    weights = [0, *integers("crossing", [crossing[p] for p in inner]), 0]

    def search(limit: int) -> list[int]:
        return _least_crossing(prefix, stages, limit, weights)

    def weight(limit: int) -> int:
        return sum(weights[block] for block in search(limit))

    widest = min(prefix[-1], math.floor(limit * (1 + Fraction(slack))))
    least = weight(widest)
    limits = range(limit, widest, limit // 1024 + 1)
    tight = bisect_left(limits, True, key=lambda limit: weight(limit) == least)
    return tuple(at[block] for block in search([*limits[tight : tight + 1], widest][0]))


def integers(what: str, values: Sequence[float]) -> list[int]:
    """The same values times one power of two, without rounding.

    Raises:
        OptionError: a value that is not finite, or below 0; `what` names them.
    """
    for at, value in enumerate(values):
        if not 0 <= value < math.inf:
            found = f"{value} at {at}"
            raise OptionError(f"`{what}`", expected="finite numbers >= 0", found=found)
    exact = (value if isinstance(value, int) else float(value) for value in values)
    ratios = [value.as_integer_ratio() for value in exact]
    scale = max((below for _, below in ratios), default=1)
    return [above * (scale // below) for above, below in ratios]


def bottleneck(prefix: Sequence[int], K: int) -> int:
    """The least limit under which filling from the left needs at most K stages (exact bisection).

    Each probe moves a bound to the next value that changes anything, so the search ends at the
    optimum itself: `high` is always the largest stage of a real cut, `low` never beats one.
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


def fill(prefix: Sequence[int], K: int, limit: int) -> list[int]:
    """Stages filled up to `limit` from the left, at least one block kept for each one after."""
    end, starts = len(prefix) - 1, [0]
    for left in range(K - 1, 0, -1):
        stop = bisect_right(prefix, prefix[starts[-1]] + limit) - 1
        starts.append(min(stop, end - left))
    return starts[1:]


def _least_crossing(prefix: Sequence[int], K: int, limit: int, weights: Sequence[int]) -> list[int]:
    """The cut of least weight whose stages are all within `limit`.

    `least[i]` is the weight of cutting blocks i.. into k stages. The next stage may start at the
    positions p > i with prefix[p] - prefix[i] <= limit, a window whose two ends only move left as
    i does, so a monotone queue gives each minimum in constant time, the first p where several tie.
    """
    end = len(prefix) - 1
    least = [0 if prefix[-1] - start <= limit else None for start in prefix]
    least[end] = None
    choices: list[array[int]] = []
    for _ in range(K - 1):
        window: deque[tuple[int, int]] = deque()
        longer: list[int | None] = [None] * (end + 1)
        choice = array("q", bytes(8 * (end + 1)))
        for i in range(end - 2, -1, -1):
            if (rest := least[i + 1]) is not None:
                weight = weights[i + 1] + rest
                while window and window[-1][0] >= weight:
                    window.pop()
                window.append((weight, i + 1))
            reach = prefix[i] + limit
            while window and prefix[window[0][1]] > reach:
                window.popleft()
            if window:
                longer[i], choice[i] = window[0]
        least = longer
        choices.append(choice)
    starts = [0]
    for choice in reversed(choices):
        starts.append(choice[starts[-1]])
    return starts[1:]
