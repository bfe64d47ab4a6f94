"""How far a stage can reach that starts at some item, within a time and its device's limit."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from .device_loads import Loads

Waiting = Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Row:
    """What one way to run a stage makes of the items, as sums up to positions."""

    times: Sequence[int]
    kept: Sequence[int]
    limit: int | None
    fetching: Sequence[int]
    copies: Sequence[int]
    waiting: Waiting
    grain: int

    @property
    def most(self) -> int:
        """A time that no stage is above."""
        return self.times[-1] + sum(self.fetching)

    def far(self, start: int, limit: int) -> int:
        """Where a stage ends at most, whatever it fetches; `start`: not even one item fits."""
        stop = bisect_right(self.times, self.times[start] + limit, start) - 1
        if self.limit is not None and stop > start:
            stop = min(stop, bisect_right(self.kept, self.kept[start] + self.limit, start) - 1)
        return stop

    def near(self, end: int, limit: int) -> int:
        """Where a stage that ends at `end` starts at least, whatever it fetches."""
        start = bisect_left(self.times, self.times[end] - limit)
        if self.limit is not None:
            start = max(start, bisect_left(self.kept, self.kept[end] - self.limit))
        return start

    def reach(self, start: int, limit: int) -> int:
        """Where the longest stage that starts at an item ends; `start`: there is none."""
        stop = self.far(start, limit)
        if not self.waiting:
            return stop
        time, space = limit, self.limit
        for use, value in self.waiting[start]:
            if use >= stop:
                break
            time -= self.fetching[value] if self.fetching else 0
            end = bisect_right(self.times, self.times[start] + time, use) - 1
            if space is not None and self.copies:
                space -= self.copies[value]
                end = min(end, bisect_right(self.kept, self.kept[start] + space, use) - 1)
            stop = min(stop, max(use, end))
        return stop

    def time(self, start: int, end: int) -> int:
        """Of a stage."""
        return self.times[end] - self.times[start] + self._more(self.fetching, start, end)

    def bytes(self, start: int, end: int) -> int:
        """Of a stage."""
        return self.kept[end] - self.kept[start] + self._more(self.copies, start, end)

    def fits(self, start: int, end: int) -> bool:
        """Whether a stage keeps the limit of its bytes."""
        return self.limit is None or self.bytes(start, end) <= self.limit

    def _more(self, of: Sequence[int], start: int, end: int) -> int:
        if not of or not self.waiting:
            return 0
        return sum(of[value] for use, value in self.waiting[start] if use < end)


@dataclass(frozen=True)
class Ways:
    """The ways in which one device (or several that are alike) may run a stage.

    A stage may end wherever it may in one of them: as far as in the one that reaches furthest.
    """

    rows: Sequence[Row]

    @cached_property
    def items(self) -> int:
        """N."""
        return len(self.rows[0].times) - 1

    @cached_property
    def most(self) -> int:
        """A time that no stage is above."""
        return max(row.most for row in self.rows)

    def far(self, start: int, limit: int) -> int:
        """Where a stage ends at most, whatever it fetches; `start`: not even one item fits."""
        return max(start, *(row.far(start, limit) for row in self.rows))

    def near(self, end: int, limit: int) -> int:
        """Where a stage that ends at `end` starts at least, whatever it fetches."""
        return min(row.near(end, limit) for row in self.rows)

    def reach(self, start: int, limit: int) -> int:
        """Where the longest stage that starts at an item ends; `start`: there is none."""
        return max(start, *(row.reach(start, limit) for row in self.rows))

    def beyond(self, start: int, end: int, limit: int, *, alone: bool) -> int | None:
        """The least time above a limit that a stage takes in some way; None: it takes no more.

        Args:
            start: of the stage.
            end: of the stage.
            limit: a time.
            alone: whatever it fetches.
        """
        times = [
            row.times[end] - row.times[start] if alone else row.time(start, end)
            for row in self.rows
        ]
        return min((time for time in times if time > limit), default=None)


def ways_of(loads: Loads) -> list[Ways]:
    """For each stage; those that are alike are one object."""
    rows = _rows_of(loads)
    made: dict[tuple[int, ...], Ways] = {}
    found = []
    for numbers in loads.rows:
        own = list({id(rows[row]): rows[row] for row in numbers}.values())
        found.append(made.setdefault(tuple(map(id, own)), Ways(own)))
    return found


def _rows_of(loads: Loads) -> list[Row]:
    """Those that are alike are one object."""
    made: dict[tuple[int | None, ...], Row] = {}
    sums: dict[int, Sequence[int]] = {}
    rows = []
    for k, limit in enumerate(loads.limits):
        fetching: Sequence[int] = loads.fetching[k] if loads.fetching else ()
        copies: Sequence[int] = loads.copies[k] if loads.copies and limit is not None else ()
        fetching = fetching if any(fetching) else ()
        parts = (loads.times[k], loads.nbytes[k] if limit is not None else (), fetching, copies)
        key = (limit, loads.grains[k], *(id(part) if len(part) else None for part in parts))
        if key not in made:
            for part in parts[:2]:
                if id(part) not in sums:
                    sums[id(part)] = _summed(part)
            waiting: Waiting = loads.waiting if fetching or copies else ()
            first, second = (sums[id(part)] for part in parts[:2])
            made[key] = Row(first, second, limit, fetching, copies, waiting, loads.grains[k])
        rows.append(made[key])
    return rows


def _summed(values: Sequence[int]) -> Sequence[int]:
    found = list(accumulate(values, initial=0))
    return array("q", found) if found[-1] < 1 << 62 else found
