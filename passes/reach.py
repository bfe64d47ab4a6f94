"""How far a stage can reach that starts at some item, within a time and its device's limit."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .unequal import Loads

Waiting = Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Row:
    """What one device (or several that are alike) makes of the items, as sums up to positions."""

    times: Sequence[int]
    kept: Sequence[int]
    limit: int | None
    fetching: Sequence[int]
    copies: Sequence[int]
    waiting: Waiting

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


def rows_of(loads: Loads) -> list[Row]:
    """For each device; those that are alike are one object."""
    made: dict[tuple[int | None, ...], Row] = {}
    sums: dict[int, Sequence[int]] = {}
    rows = []
    for k, limit in enumerate(loads.limits):
        fetching: Sequence[int] = loads.fetching[k] if loads.fetching else ()
        copies: Sequence[int] = loads.copies[k] if loads.copies and limit is not None else ()
        fetching = fetching if any(fetching) else ()
        parts = (loads.times[k], loads.nbytes[k] if limit is not None else (), fetching, copies)
        key = (limit, *(id(part) if len(part) else None for part in parts))
        if key not in made:
            for part in parts[:2]:
                if id(part) not in sums:
                    sums[id(part)] = _summed(part)
            waiting: Waiting = loads.waiting if fetching or copies else ()
            first, second = (sums[id(part)] for part in parts[:2])
            made[key] = Row(first, second, limit, fetching, copies, waiting)
        rows.append(made[key])
    return rows


def _summed(values: Sequence[int]) -> Sequence[int]:
    found = list(accumulate(values, initial=0))
    return array("q", found) if found[-1] < 1 << 62 else found
