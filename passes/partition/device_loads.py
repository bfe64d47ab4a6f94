"""Times and bytes of N items in a row on K devices, equal or different.

The order of the devices is fixed: stage k is on device k. All numbers are integers. A stage may
have several options (rematerialization policies, for example), each with its own times and bytes.
`hetero_cut` cuts the row.
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

from .scaled_integers import to_integers, unit_of


@dataclass(frozen=True)
class DeviceSpec:
    """The device of one stage.

    Attributes:
        speed: the graph's times are divided by it, > 0.
        seconds: forward + backward time of each node on this device, N values >= 0; None: the
            graph's times divided by `speed`.
        memory_bytes: memory for one stage; None: no limit.
        parameter_factor: bytes stored for each byte of parameters: 1 for parameters alone, 4 with
            gradients and two optimizer moments.
        in_flight: number of micro-batches whose activations are stored at once: M under GPipe,
            min(K - k, M) in stage k under 1F1B.
    """

    speed: float = 1.0
    seconds: tuple[float, ...] | None = None
    memory_bytes: int | None = None
    parameter_factor: float = 1.0
    in_flight: int = 1

    def verify(self, nodes: int) -> None:
        """Check ranges and lengths.

        Args:
            nodes: N, the number of nodes of the graph.

        Raises:
            OptionError: naming the field.
        """
        factor, memory = self.parameter_factor, self.memory_bytes
        count = nodes if self.seconds is None else len(self.seconds)
        checks: list[tuple[str, bool, str, float | None]] = [
            ("speed", 0 < self.speed < math.inf, "finite, > 0", self.speed),
            ("memory_bytes", memory is None or memory >= 0, "bytes >= 0", memory),
            ("parameter_factor", 0 <= factor < math.inf, "finite, >= 0", factor),
            ("in_flight", self.in_flight >= 0, "micro-batches >= 0", self.in_flight),
            ("seconds", count == nodes, f"{nodes} values", count),
        ]
        for name, valid, expected, value in checks:
            if not valid:
                raise OptionError(f"`{name}` of a device", expected=expected, found=f"{value}")


@dataclass(frozen=True)
class BoundaryValue:
    """A value that a stage must receive, or store a copy of, if an earlier stage has it.

    Attributes:
        producer: the item that computes it (for a parameter: that uses it first); -1: it exists
            before all items.
        consumers: the later items that use it, ascending.
    """

    producer: int
    consumers: tuple[int, ...]


@dataclass(frozen=True)
class DeviceLoads:
    """Times and bytes of N items in a row on each of K devices, in integers, for A >= K options.

    An option is one way to run a stage. The cost of a stage under an option is the sum over its
    items, plus the receive time and copy bytes of each value that its items use and that was
    computed before its first item, counted once. A stage uses its fastest option among those within
    their byte limits, the first of several; if there is none, the option that exceeds its limit
    least. (Options with equal numbers may share the tuples; shared tuples are processed once.)

    Attributes:
        times: A times N costs, in one unit for all.
        unit: seconds of one unit of `times`.
        nbytes: A times N memory costs, in the byte units of each option.
        byte_limits: A limits on sums of `nbytes`, in the same units; None: no limit.
        units_per_byte: A integers: how many byte units of an option make one byte.
        values: V values that more than one item uses.
        receive_times: A times V costs to receive them, in the unit of `times`; empty: free.
        copy_bytes: A times V sizes of their copies, in byte units; empty: no memory.
        item_names: names of the items for messages; may be empty.
        stage_options: for each of K stages the numbers of its options, at least one; empty: stage k
            has option k alone.
    """

    times: tuple[Sequence[int], ...]
    unit: Fraction
    nbytes: tuple[Sequence[int], ...]
    byte_limits: tuple[int | None, ...]
    units_per_byte: tuple[int, ...]
    values: tuple[BoundaryValue, ...] = ()
    receive_times: tuple[Sequence[int], ...] = ()
    copy_bytes: tuple[Sequence[int], ...] = ()
    item_names: tuple[str, ...] = ()
    stage_options: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls,
        devices: Sequence[DeviceSpec],
        seconds: Sequence[float],
        parameters: Sequence[int],
        activations: Sequence[int],
    ) -> DeviceLoads:
        """The loads of N nodes in a given order, one option per device.

        Args:
            devices: K devices.
            seconds: N times.
            parameters: N sizes of parameters, in bytes.
            activations: N sizes of outputs, in bytes.

        Raises:
            OptionError: a device with a value out of range, or of the wrong length.
        """
        scaled: list[tuple[list[int], Fraction]] = []
        for device in devices:
            device.verify(len(seconds))
            own = seconds if device.seconds is None else device.seconds
            costs = to_integers("seconds", own)
            unit = unit_of(own, costs)
            unit = unit / Fraction(device.speed) if device.seconds is None else unit
            scaled.append((costs, unit))
        common = math.lcm(*(unit.denominator for _, unit in scaled))
        times = tuple(
            tuple(cost * factor for cost in costs)
            for costs, unit in scaled
            for factor in [unit.numerator * (common // unit.denominator)]
        )
        nbytes, limits, units_per_byte = [], [], []
        for device in devices:
            factor, units = float(device.parameter_factor).as_integer_ratio()
            pairs = zip(parameters, activations, strict=True)
            nbytes.append(tuple(p * factor + a * units * device.in_flight for p, a in pairs))
            limits.append(None if device.memory_bytes is None else device.memory_bytes * units)
            units_per_byte.append(units)
        return cls(times, Fraction(1, common), tuple(nbytes), tuple(limits), tuple(units_per_byte))

    @classmethod
    def of_equal_devices(cls, costs: Sequence[int], stages: int) -> DeviceLoads:
        """The loads of N items on K equal devices without memory limits.

        Args:
            costs: N integers; the unit of time is that of one of them.
            stages: K.
        """
        nbytes: Sequence[int] = (0,) * len(costs)
        unlimited = (None,) * stages
        return cls((costs,) * stages, Fraction(1), (nbytes,) * stages, unlimited, (1,) * stages)

    @cached_property
    def options(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the numbers of its options."""
        return self.stage_options or tuple((option,) for option in range(len(self.times)))

    @cached_property
    def min_times(self) -> tuple[Sequence[int], ...]:
        """For each stage the minimum over its options of each item's time, ignoring memory."""
        found: dict[tuple[int, ...], Sequence[int]] = {}
        for options in self.options:
            times = list({id(self.times[one]): self.times[one] for one in options}.values())
            key = tuple(map(id, times))
            if key not in found:
                columns = zip(*times, strict=True)
                found[key] = times[0] if len(times) == 1 else tuple(map(min, columns))
        return tuple(
            found[tuple({id(self.times[one]): None for one in options})] for options in self.options
        )

    @property
    def lower_bound(self) -> int:
        """A lower bound on the largest stage's time, for any order and without memory limits.

        The larger of two bounds: the largest over items of their minimal time; and, since
        T sum(w) >= sum over stages of w times stage time for any weights w >= 0 of the devices, the
        sum over items of their minimal weighted time, over sum(w). Weights equal to the devices'
        overall speeds are about best.
        """
        rows = list({id(row): row for row in self.min_times}.values())
        if not (fastest := min(sum(row) for row in rows)):
            return 0
        weights = {id(row): (fastest << 64) // sum(row) for row in rows}
        own = list(weights.values())
        least: list[int] = [min(column) for column in zip(*rows, strict=True)]
        total: int = sum(min(map(mul, column, own)) for column in zip(*rows, strict=True))
        return max(-(-total // sum(weights[id(row)] for row in self.min_times)), *least)

    @cached_property
    def incoming(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each position 0..N - 1 the values computed before it and used at or after it.

        Each as (first item from there on that uses it, number of the value), ascending.
        """
        found: list[list[tuple[int, int]]] = [[] for _ in self.times[0]]
        for v, value in enumerate(self.values):
            for before, use in pairwise((value.producer, *value.consumers)):
                for position in range(before + 1, use + 1):
                    found[position].append((use, v))
        return tuple(tuple(sorted(each)) for each in found)

    def chosen_options(self, starts: Sequence[int]) -> tuple[int, ...]:
        """The option that each stage of a cut uses.

        Args:
            starts: the K - 1 items at which stages 1..K-1 start.
        """
        bounds = list(pairwise([0, *starts, len(self.times[0])]))
        found = []
        for options, (a, b) in zip(self.options, bounds, strict=True):
            sizes = {one: self._sum(self.nbytes, self.copy_bytes, one, a, b) for one in options}
            excess = {one: self._excess_bytes(one, size) for one, size in sizes.items()}
            fitting = [one for one in options if not excess[one]]
            times = {one: self._sum(self.times, self.receive_times, one, a, b) for one in fitting}
            found.append(min(times or excess, key=(times or excess).__getitem__))
        return tuple(found)

    def fits(self, starts: Sequence[int]) -> bool:
        """Whether every stage of a cut is within the limit of the option that it uses.

        Args:
            starts: the K - 1 items at which stages 1..K-1 start.
        """
        sums = self._stage_sums(self.nbytes, self.copy_bytes, starts)
        chosen = zip(self.chosen_options(starts), sums, strict=True)
        return not any(self._excess_bytes(option, size) for option, size in chosen)

    def stage_bytes(self, starts: Sequence[int]) -> tuple[int, ...]:
        """Memory of each stage of a cut, in bytes, rounded up.

        Args:
            starts: the K - 1 items at which stages 1..K-1 start.
        """
        sums = self._stage_sums(self.nbytes, self.copy_bytes, starts)
        units = [self.units_per_byte[option] for option in self.chosen_options(starts)]
        return tuple(-(-size // unit) for size, unit in zip(sums, units, strict=True))

    def stage_times(self, starts: Sequence[int]) -> tuple[int, ...]:
        """The time of each stage of a cut, in `unit`.

        Args:
            starts: the K - 1 items at which stages 1..K-1 start.
        """
        return tuple(self._stage_sums(self.times, self.receive_times, starts))

    def _excess_bytes(self, option: int, size: int) -> Fraction:
        """The number of bytes by which a sum of `nbytes` exceeds the option's limit."""
        limit = self.byte_limits[option]
        excess = 0 if limit is None else max(0, size - limit)
        return Fraction(excess, self.units_per_byte[option])

    def _stage_sums(
        self,
        per_item: Sequence[Sequence[int]],
        per_value: Sequence[Sequence[int]],
        starts: Sequence[int],
    ) -> list[int]:
        """For each stage the sum of its chosen option."""
        bounds = pairwise([0, *starts, len(self.times[0])])
        chosen = zip(self.chosen_options(starts), bounds, strict=True)
        return [self._sum(per_item, per_value, option, a, b) for option, (a, b) in chosen]

    def _sum(
        self,
        per_item: Sequence[Sequence[int]],
        per_value: Sequence[Sequence[int]],
        option: int,
        a: int,
        b: int,
    ) -> int:
        """The sum of an option over items a..b-1 and over the values that they receive."""
        received = [v for use, v in self.incoming[a] if use < b] if per_value else []
        return sum(per_item[option][a:b]) + sum(per_value[option][v] for v in received)
