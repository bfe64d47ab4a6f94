"""Stages on devices that differ: in speed, in memory, in what they keep per parameter.

The order of the devices is fixed: stage k is on device k. What the items in a row take of each is
plain arrays of integers, several for a stage that may run in several ways; `contiguous` cuts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from operator import mul

from autopipe.errors import OptionError

from .chain_cut import integers


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
class Value:
    """What a stage must fetch, or hold a copy of, if it uses it and an item before it made it.

    Attributes:
        made: the item that makes it; -1: it is there before all items.
        uses: the later items that use it, ascending.
    """

    made: int
    uses: tuple[int, ...]


@dataclass(frozen=True)
class Loads:
    """Times and bytes of N items in a row on each of K devices, in integers: A >= K rows.

    A stage takes the sums of its items' rows, and for each value that one of its items uses and
    that was made before its first item, once, that value's time and bytes. Of several rows it
    takes the one of least time among those that keep their limits; the first of several; if none
    does, the one that misses its limit by least. (Rows that are equal may be one object; then they
    are looked at once.)

    Attributes:
        times: A times N costs, in one unit for all.
        unit: seconds.
        nbytes: A times N bytes, each row in a unit of its own.
        limits: of the sums of rows of `nbytes`; None: no limit.
        grains: for each row of `nbytes`, how many of its units are a byte.
        values: V values that more than one item knows.
        fetching: A times V costs of fetching them, in the unit of `times`; or empty: no cost.
        copies: A times V sizes of them, in the unit of the row of `nbytes`; or empty: nothing.
        names: of the items, for messages.
        ways: for each of K stages its rows, at least one; empty: row k is that of stage k.
    """

    times: tuple[Sequence[int], ...]
    unit: Fraction
    nbytes: tuple[Sequence[int], ...]
    limits: tuple[int | None, ...]
    grains: tuple[int, ...]
    values: tuple[Value, ...] = ()
    fetching: tuple[Sequence[int], ...] = ()
    copies: tuple[Sequence[int], ...] = ()
    names: tuple[str, ...] = ()
    ways: tuple[tuple[int, ...], ...] = ()

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

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the rows that it may take."""
        return self.ways or tuple((row,) for row in range(len(self.times)))

    @cached_property
    def least_times(self) -> tuple[Sequence[int], ...]:
        """For each stage the least times of the items, whatever it takes of memory."""
        found: dict[tuple[int, ...], Sequence[int]] = {}
        for rows in self.rows:
            times = list({id(self.times[row]): self.times[row] for row in rows}.values())
            key = tuple(map(id, times))
            if key not in found:
                columns = zip(*times, strict=True)
                found[key] = times[0] if len(times) == 1 else tuple(map(min, columns))
        return tuple(
            found[tuple({id(self.times[row]): None for row in rows})] for rows in self.rows
        )

    @property
    def bound(self) -> int:
        """A time that the largest stage of no cut is below, whatever the order and the limits.

        The largest over items of their least time; and, as T sum(w) >= sum over stages of w times
        stage time, for any weights w >= 0 of the devices, the sum over items of their least
        weighted time over sum(w). Weights as the devices' speeds on the whole are about best.
        """
        rows = list({id(row): row for row in self.least_times}.values())
        if not (whole := min(sum(row) for row in rows)):
            return 0
        weights = {id(row): (whole << 64) // sum(row) for row in rows}
        own = list(weights.values())
        least: list[int] = [min(column) for column in zip(*rows, strict=True)]
        total: int = sum(min(map(mul, column, own)) for column in zip(*rows, strict=True))
        return max(-(-total // sum(weights[id(row)] for row in self.least_times)), *least)

    @cached_property
    def waiting(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each position 0..N - 1 the values made before it and used from it on.

        Each with the first item from there on that uses it: (item, value), ascending.
        """
        found: list[list[tuple[int, int]]] = [[] for _ in self.times[0]]
        for v, value in enumerate(self.values):
            for before, use in pairwise((value.made, *value.uses)):
                for position in range(before + 1, use + 1):
                    found[position].append((use, v))
        return tuple(tuple(sorted(each)) for each in found)

    def chosen(self, starts: Sequence[int]) -> tuple[int, ...]:
        """The row that each stage of a cut takes."""
        bounds = list(pairwise([0, *starts, len(self.times[0])]))
        found = []
        for rows, (a, b) in zip(self.rows, bounds, strict=True):
            sizes = {row: self._sum(self.nbytes, self.copies, row, a, b) for row in rows}
            over = {row: self._over(row, size) for row, size in sizes.items()}
            fitting = [row for row in rows if not over[row]]
            times = {row: self._sum(self.times, self.fetching, row, a, b) for row in fitting}
            found.append(min(times or over, key=(times or over).__getitem__))
        return tuple(found)

    def stage_bytes(self, starts: Sequence[int]) -> tuple[int, ...]:
        """Bytes that each stage of a cut keeps, rounded up."""
        sums = self._sums(self.nbytes, self.copies, starts)
        grains = [self.grains[row] for row in self.chosen(starts)]
        return tuple(-(-size // grain) for size, grain in zip(sums, grains, strict=True))

    def stage_times(self, starts: Sequence[int]) -> tuple[int, ...]:
        """The time of each stage of a cut."""
        return tuple(self._sums(self.times, self.fetching, starts))

    def _over(self, row: int, size: int) -> Fraction:
        """By how many bytes a sum of a row of `nbytes` is above its limit."""
        limit = self.limits[row]
        return Fraction(0 if limit is None else max(0, size - limit), self.grains[row])

    def _sums(
        self, rows: Sequence[Sequence[int]], more: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[int]:
        """What the stages take of their rows."""
        bounds = pairwise([0, *starts, len(self.times[0])])
        chosen = zip(self.chosen(starts), bounds, strict=True)
        return [self._sum(rows, more, row, a, b) for row, (a, b) in chosen]

    def _sum(
        self,
        rows: Sequence[Sequence[int]],
        more: Sequence[Sequence[int]],
        row: int,
        a: int,
        b: int,
    ) -> int:
        """Of a row over a stage, and of what it adds for values that it receives."""
        received = [v for use, v in self.waiting[a] if use < b] if more else []
        return sum(rows[row][a:b]) + sum(more[row][v] for v in received)


def unit_of(values: Sequence[float], costs: Sequence[int]) -> Fraction:
    """What one unit of `costs`, the same values as integers, is."""
    pairs = zip(values, costs, strict=True)
    return next((Fraction(value) / cost for value, cost in pairs if cost), Fraction(1))
