"""Stages on devices that differ: in speed, in memory, in what they keep per parameter.

The order of the devices is fixed: stage k is on device k. For a given order of the nodes the cut
is exact: any part of a run that fits a device fits it too, so a stage that starts at i may end at
every position up to some reach(i), and reach grows with i. Among the cuts whose largest stage time
is least, or within a slack of it, one with the least crossing is found in O(N K).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from operator import mul

from autopipe.errors import OptionError, PartitionError

from .cuts import integers


@dataclass(frozen=True)
class DeviceSpec:
    """What one stage runs on.

    Attributes:
        speed: the graph's times are divided by it, > 0.
        seconds: forward + backward time of each node on this device, N values >= 0; None: the
            graph's times by `speed`.
        memory_bytes: what a stage may keep here; None: no limit.
        parameter_factor: bytes kept for each byte of parameters: 1 for them alone, 4 with gradients
            and two moments of an optimizer.
        in_flight: micro-batches of which activations are kept at once: M under GPipe, min(K - k, M)
            in stage k under 1F1B.
    """

    speed: float = 1.0
    seconds: tuple[float, ...] | None = None
    memory_bytes: int | None = None
    parameter_factor: float = 1.0
    in_flight: int = 1

    def verify(self, nodes: int) -> None:
        """Check ranges and lengths.

        Raises:
            OptionError: naming the field.
        """
        factor, memory = self.parameter_factor, self.memory_bytes
        own = nodes if self.seconds is None else len(self.seconds)
        facts: list[tuple[str, bool, str, float | None]] = [
            ("speed", 0 < self.speed < math.inf, "finite, > 0", self.speed),
            ("memory_bytes", memory is None or memory >= 0, "bytes >= 0", memory),
            ("parameter_factor", 0 <= factor < math.inf, "finite, >= 0", factor),
            ("in_flight", self.in_flight >= 0, "micro-batches >= 0", self.in_flight),
            ("seconds", own == nodes, f"{nodes} values", own),
        ]
        for what, right, expected, value in facts:
            if not right:
                raise OptionError(f"`{what}` of a device", expected=expected, found=f"{value}")


@dataclass(frozen=True)
class Loads:
    """Times and bytes of N items in a row on each of K devices, in integers.

    Attributes:
        times: K times N costs, in one unit for all.
        unit: seconds.
        nbytes: K times N bytes, each row in a unit of its own.
        limits: of the sums of rows of `nbytes`; None: no limit.
        grains: for each row of `nbytes`, how many of its units are a byte.
    """

    times: tuple[tuple[int, ...], ...]
    unit: Fraction
    nbytes: tuple[tuple[int, ...], ...]
    limits: tuple[int | None, ...]
    grains: tuple[int, ...]

    @classmethod
    def of(
        cls,
        devices: Sequence[DeviceSpec],
        seconds: Sequence[float],
        parameters: Sequence[int],
        activations: Sequence[int],
    ) -> Loads:
        """The loads of N nodes, in the order given; sizes in bytes.

        Raises:
            OptionError: a device with a value out of range, or of the wrong length.
        """
        rows: list[tuple[list[int], Fraction]] = []
        for device in devices:
            device.verify(len(seconds))
            own = seconds if device.seconds is None else device.seconds
            costs = integers("seconds", own)
            unit = unit_of(own, costs)
            rows.append((costs, unit / Fraction(device.speed) if device.seconds is None else unit))
        common = math.lcm(*(unit.denominator for _, unit in rows))
        times = tuple(
            tuple(cost * factor for cost in costs)
            for costs, unit in rows
            for factor in [unit.numerator * (common // unit.denominator)]
        )
        nbytes, limits, grains = [], [], []
        for device in devices:
            factor, grain = float(device.parameter_factor).as_integer_ratio()
            pairs = zip(parameters, activations, strict=True)
            nbytes.append(tuple(p * factor + a * grain * device.in_flight for p, a in pairs))
            limits.append(None if device.memory_bytes is None else device.memory_bytes * grain)
            grains.append(grain)
        return cls(times, Fraction(1, common), tuple(nbytes), tuple(limits), tuple(grains))

    @property
    def bound(self) -> int:
        """A time that the largest stage of no cut is below, whatever the order and the limits.

        The largest over items of their least time; and, as T sum(w) >= sum over stages of w times
        stage time, for any weights w >= 0 of the devices, the sum over items of their least
        weighted time over sum(w). Weights as the devices' speeds on the whole are about best.
        """
        if not (whole := min(sum(row) for row in self.times)):
            return 0
        weights = [(whole << 64) // sum(row) for row in self.times]
        least: list[int] = [min(column) for column in zip(*self.times, strict=True)]
        columns = zip(*self.times, strict=True)
        total: int = sum(min(map(mul, column, weights)) for column in columns)
        return max(-(-total // sum(weights)), *least)

    def stage_bytes(self, starts: Sequence[int]) -> tuple[int, ...]:
        """Bytes that each stage of a cut keeps, rounded up."""
        bounds = pairwise([0, *starts, len(self.times[0])])
        rows = zip(self.nbytes, self.grains, bounds, strict=True)
        return tuple(-(-sum(row[a:b]) // grain) for row, grain, (a, b) in rows)

    def stage_times(self, starts: Sequence[int]) -> tuple[int, ...]:
        """The time of each stage of a cut."""
        bounds = pairwise([0, *starts, len(self.times[0])])
        return tuple(sum(row[a:b]) for row, (a, b) in zip(self.times, bounds, strict=True))


def unit_of(values: Sequence[float], costs: Sequence[int]) -> Fraction:
    """What one unit of `costs`, the same values as integers, is."""
    pairs = zip(values, costs, strict=True)
    return next((Fraction(value) / cost for value, cost in pairs if cost), Fraction(1))


def cut_on(
    loads: Loads, crossing: Sequence[int] | None = None, slack: float = 0.0
) -> tuple[int, ...]:
    """Cut N items in a row into a stage of at least one item for each device. Exact.

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
    N, weights = len(loads.times[0]), [0] * (len(loads.times[0]) + 1)
    sums = [list(accumulate(row, initial=0)) for row in loads.times]
    kept = [list(accumulate(row, initial=0)) for row in loads.nbytes]
    memory = [_reach(row, limit) for row, limit in zip(kept, loads.limits, strict=True)]

    def reaches(limit: int) -> list[list[int]]:
        rows = zip((_reach(row, limit) for row in sums), memory, strict=True)
        return [[min(pair) for pair in zip(a, b, strict=True)] for a, b in rows]

    def beyond(limit: int, reach: Sequence[Sequence[int]]) -> int:
        """The least limit above which some stage reaches further."""
        rows = zip(sums, reach, memory, strict=True)
        return min(
            (s[r[i] + 1] - s[i] for s, r, m in rows for i in range(N) if r[i] < m[i]),
            default=limit + 1,
        )

    if (starts := _least(memory, weights)) is None:
        raise _does_not_fit(loads, kept, memory)
    high = max(loads.stage_times(starts))
    low = limit = _filled(sums, memory, high)
    while low < high:
        reach = reaches(limit)
        if (found := _least(reach, weights)) is None:
            low = beyond(limit, reach)
        else:
            starts, high = found, max(loads.stage_times(found))
        limit = (low + high) // 2
    if crossing is not None:
        limit = math.floor(high * (1 + Fraction(slack)))
        starts = _least(reaches(limit), crossing) or starts
    return tuple(starts)


def _filled(sums: Sequence[Sequence[int]], memory: Sequence[Sequence[int]], high: int) -> int:
    """The least time within which stages filled from the left hold all, if stages may be empty."""
    low, N = 0, len(memory[0])
    while low < high:
        limit = (low + high) // 2
        at, largest, beyond = 0, 0, high
        for prefix, most in zip(sums, memory, strict=True):
            if at == N:
                break
            to = min(bisect_right(prefix, prefix[at] + limit) - 1, most[at])
            largest = max(largest, prefix[to] - prefix[at])
            if to < most[at]:
                beyond = min(beyond, prefix[to + 1] - prefix[at])
            at = to
        if at == N:
            high = largest
        else:
            low = beyond
    return high


def _reach(prefix: Sequence[int], limit: int | None) -> list[int]:
    """For each position 0..N - 1, where the longest run within the limit that starts there ends."""
    end = len(prefix) - 1
    if limit is None:
        return [end] * end
    reach, stop = [], 0
    for start in range(end):
        stop = max(stop, start)
        if stop < end and prefix[stop + 1] - prefix[start] <= limit:
            stop = bisect_right(prefix, prefix[start] + limit, stop) - 1
        reach.append(stop)
    return reach


def _least(reach: Sequence[Sequence[int]], weights: Sequence[int]) -> list[int] | None:
    """The cut of least weight in which no stage ends beyond its reach; None: there is none.

    `least[i]` is the weight of cutting items i.. into the stages from k on. A window of ends whose
    sides only move left as i does, in a monotone queue, gives each in constant time.
    """
    N, K = len(reach[0]), len(reach)
    least: list[int | None] = [0 if end == N else None for end in reach[-1]]
    choices: list[array[int]] = []
    for row in reversed(reach[:-1]):
        window: deque[tuple[int, int]] = deque()
        longer: list[int | None] = [None] * N
        choice = array("q", bytes(8 * N))
        for i in range(N - 2, -1, -1):
            if (rest := least[i + 1]) is not None:
                weight = weights[i + 1] + rest
                while window and window[-1][0] >= weight:
                    window.pop()
                window.append((weight, i + 1))
            while window and window[0][1] > row[i]:
                window.popleft()
            if window:
                longer[i], choice[i] = window[0]
        least = longer
        choices.append(choice)
    if least[0] is None:
        return None
    starts = [0]
    for choice in reversed(choices):
        starts.append(choice[starts[-1]])
    assert len(starts) == K
    return starts[1:]


def _does_not_fit(
    loads: Loads, kept: Sequence[Sequence[int]], memory: Sequence[Sequence[int]]
) -> PartitionError:
    """Which stage, and how much is missing there, when stages are filled one after the other."""
    N, K, at = len(loads.times[0]), len(loads.times), 0
    for k in range(K):
        left = K - 1 - k  # items that the stages after this one need
        to = min(memory[k][at], N - left) if k < K - 1 else memory[k][at]
        if to == at or (k == K - 1 and to < N):
            limit = loads.limits[k]
            assert limit is not None
            end = N if k == K - 1 else at + 1
            missing = -(-(kept[k][end] - kept[k][at] - limit) // loads.grains[k])
            have, need = limit // loads.grains[k], limit // loads.grains[k] + missing
            return PartitionError(
                f"stage {k} does not fit its device: {missing} bytes are missing",
                expected=f"{need} bytes for items {at} to {end - 1} of {N}",
                found=f"{have} bytes",
                remedy="give that stage more memory, keep fewer micro-batches in flight, or use "
                "more devices",
            )
        at = to
    raise AssertionError("filling found a cut that the search did not")
