"""How far a stage that starts at a given item can reach within a time and its device's memory."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from .device_loads import DeviceLoads

Incoming = Sequence[Sequence[tuple[int, int]]]
"""See `DeviceLoads.incoming`."""


@dataclass(frozen=True)
class OptionSums:
    """One option of a stage (a way to run it), as prefix sums over the items.

    Attributes:
        time_sums: N + 1 prefix sums of times.
        byte_sums: N + 1 prefix sums of memory; unused without a limit.
        byte_limit: see `DeviceLoads.byte_limits`.
        receive_times: of each value; empty: free.
        copy_bytes: of each value; empty: no memory.
        incoming: the values that stages receive, by start; empty if they cost nothing.
        units_per_byte: see `DeviceLoads`.
    """

    time_sums: Sequence[int]
    byte_sums: Sequence[int]
    byte_limit: int | None
    receive_times: Sequence[int]
    copy_bytes: Sequence[int]
    incoming: Incoming
    units_per_byte: int

    @property
    def max_time(self) -> int:
        """An upper bound on the time of a stage."""
        return self.time_sums[-1] + sum(self.receive_times)

    def farthest_end(self, start: int, limit: int) -> int:
        """The last possible end of a stage if receiving is free; `start`: no item fits.

        Args:
            start: the first item of the stage.
            limit: on its time.
        """
        end = bisect_right(self.time_sums, self.time_sums[start] + limit, start) - 1
        if self.byte_limit is not None and end > start:
            most = self.byte_sums[start] + self.byte_limit
            end = min(end, bisect_right(self.byte_sums, most, start) - 1)
        return end

    def earliest_start(self, end: int, limit: int) -> int:
        """The first possible start of a stage that ends at `end` if receiving is free.

        Args:
            end: the item after the stage.
            limit: on its time.
        """
        start = bisect_left(self.time_sums, self.time_sums[end] - limit)
        if self.byte_limit is not None:
            least = self.byte_sums[end] - self.byte_limit
            start = max(start, bisect_left(self.byte_sums, least))
        return start

    def reach(self, start: int, limit: int) -> int:
        """The end of the longest stage that starts at an item; `start`: there is none.

        Args:
            start: the first item of the stage.
            limit: on its time, with what it receives.
        """
        end = self.farthest_end(start, limit)
        if not self.incoming:
            return end
        time, space = limit, self.byte_limit
        for use, value in self.incoming[start]:
            if use >= end:
                break
            time -= self.receive_times[value] if self.receive_times else 0
            stop = bisect_right(self.time_sums, self.time_sums[start] + time, use) - 1
            if space is not None and self.copy_bytes:
                space -= self.copy_bytes[value]
                most = self.byte_sums[start] + space
                stop = min(stop, bisect_right(self.byte_sums, most, use) - 1)
            end = min(end, max(use, stop))
        return end

    def time(self, start: int, end: int) -> int:
        """Time of a stage, with what it receives.

        Args:
            start: the first item of the stage.
            end: the item after it.
        """
        received = self._received(self.receive_times, start, end)
        return self.time_sums[end] - self.time_sums[start] + received

    def memory(self, start: int, end: int) -> int:
        """Memory of a stage, with copies of what it receives, in byte units.

        Args:
            start: the first item of the stage.
            end: the item after it.
        """
        received = self._received(self.copy_bytes, start, end)
        return self.byte_sums[end] - self.byte_sums[start] + received

    def _received(self, per_value: Sequence[int], start: int, end: int) -> int:
        if not per_value or not self.incoming:
            return 0
        return sum(per_value[value] for use, value in self.incoming[start] if use < end)


@dataclass(frozen=True)
class StageOptions:
    """The options of one stage, or of several stages that are alike.

    A stage may end wherever one of its options allows, so its reach is that of the option that
    reaches farthest.
    """

    options: Sequence[OptionSums]

    @cached_property
    def items(self) -> int:
        """N."""
        return len(self.options[0].time_sums) - 1

    @cached_property
    def max_time(self) -> int:
        """An upper bound on the time of a stage."""
        return max(option.max_time for option in self.options)

    def farthest_end(self, start: int, limit: int) -> int:
        """The last possible end of a stage if receiving is free; `start`: no item fits.

        Args:
            start: the first item of the stage.
            limit: on its time.
        """
        return max(start, *(option.farthest_end(start, limit) for option in self.options))

    def earliest_start(self, end: int, limit: int) -> int:
        """The first possible start of a stage that ends at `end` if receiving is free.

        Args:
            end: the item after the stage.
            limit: on its time.
        """
        return min(option.earliest_start(end, limit) for option in self.options)

    def reach(self, start: int, limit: int) -> int:
        """The end of the longest stage that starts at an item; `start`: there is none.

        Args:
            start: the first item of the stage.
            limit: on its time, with what it receives.
        """
        return max(start, *(option.reach(start, limit) for option in self.options))

    def next_time(self, start: int, end: int, limit: int, *, receive: bool) -> int | None:
        """The least time above a limit that an option takes for a stage; None: none is above.

        Args:
            start: the first item of the stage.
            end: the item after it.
            limit: a time.
            receive: count the time to receive values.
        """
        times = [
            option.time(start, end) if receive else option.time_sums[end] - option.time_sums[start]
            for option in self.options
        ]
        return min((time for time in times if time > limit), default=None)


def options_of_stages(loads: DeviceLoads) -> list[StageOptions]:
    """For each stage its options; stages with the same options share one object.

    Args:
        loads: N items on K devices.
    """
    sums = _option_sums(loads)
    shared: dict[tuple[int, ...], StageOptions] = {}
    found = []
    for numbers in loads.options:
        own = list({id(sums[option]): sums[option] for option in numbers}.values())
        found.append(shared.setdefault(tuple(map(id, own)), StageOptions(own)))
    return found


def _option_sums(loads: DeviceLoads) -> list[OptionSums]:
    """For each option its sums; options with the same numbers share one object."""
    shared: dict[tuple[int | None, ...], OptionSums] = {}
    sums: dict[int, Sequence[int]] = {}
    found = []
    for k, limit in enumerate(loads.byte_limits):
        receive: Sequence[int] = loads.receive_times[k] if loads.receive_times else ()
        copies: Sequence[int] = (
            loads.copy_bytes[k] if loads.copy_bytes and limit is not None else ()
        )
        receive = receive if any(receive) else ()
        parts = (loads.times[k], loads.nbytes[k] if limit is not None else (), receive, copies)
        units = loads.units_per_byte[k]
        key = (limit, units, *(id(part) if len(part) else None for part in parts))
        if key not in shared:
            for part in parts[:2]:
                if id(part) not in sums:
                    sums[id(part)] = _prefix_sums(part)
            incoming: Incoming = loads.incoming if receive or copies else ()
            times, nbytes = (sums[id(part)] for part in parts[:2])
            shared[key] = OptionSums(times, nbytes, limit, receive, copies, incoming, units)
        found.append(shared[key])
    return found


def _prefix_sums(values: Sequence[int]) -> Sequence[int]:
    found = list(accumulate(values, initial=0))
    return array("q", found) if found[-1] < 1 << 62 else found
