"""Where offloading stands in a schedule: which micro-batches leave their device, when they return.

What F of a micro-batch has saved leaves after F, and comes back one action before the one that
reads it, so that the copy runs beside that action. A micro-batch that is read soon after its
forward stays: it would return at once. (The idea: PipeOffload, arXiv 2503.01328.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

from .actions import Scheduled

LEAST_DISTANCE = 4
"""From F to the reader, in actions of the device: the copy out may take the first of those between,
and the copy back the last; there must be one in which the device has neither."""


Copy = Callable[[int, int], float]
"""From stage and micro-batch to the seconds that a copy to the host, or back, takes."""


class Offload(NamedTuple):
    """The absence of what one micro-batch saved at one stage.

    Attributes:
        stage: the stage.
        microbatch: the micro-batch.
        after: the action of its device after which it leaves: its F, as an index.
        before: the action before which the copy back starts.
        reader: the action that reads it: the first of its others.
    """

    stage: int
    microbatch: int
    after: int
    before: int
    reader: int


def offloads(scheduled: Scheduled, stages: Container[int]) -> tuple[tuple[Offload, ...], ...]:
    """Find what is offloaded, and where.

    Args:
        scheduled: a valid schedule.
        stages: those that offload.

    Returns:
        For each device, in the order of `after`. Where all forwards come before all other actions,
        which then are a function of their own, everything returns in that function.
    """
    begin = backward_start(scheduled)
    found = []
    for device, row in enumerate(scheduled.devices):
        forward: dict[tuple[int, int], int] = {}
        own = []
        for i, action in enumerate(row):
            key = action.stage, action.microbatch
            if action.phase == "F":
                forward[key] = i
            elif key in forward:
                after = forward.pop(key)
                if action.stage in stages and i - after >= LEAST_DISTANCE:
                    before = max(i - 1, begin.get(device, 0))
                    own.append(Offload(*key, after, before, i))
        found.append(tuple(sorted(own, key=lambda one: one.after)))
    return tuple(found)


def backward_start(scheduled: Scheduled) -> Mapping[int, int]:
    """By device the index of its first backward action, if all forwards of all devices come first.

    The caller's loss may stand between the two. Empty if a backward starts before.
    """
    counts = {}
    for device, row in enumerate(scheduled.devices):
        count = counts[device] = sum(action.phase == "F" for action in row)
        if any(action.phase == "F" for action in row[count:]):
            return {}
    return counts


class HostCopy(NamedTuple):
    """A copy between a device and the host.

    Attributes:
        stage, microbatch: whose saved values are copied.
        out: whether they leave the device; else they return.
        start, end: when.
    """

    stage: int
    microbatch: int
    out: bool
    start: float
    end: float


class Move(NamedTuple):
    """Saved values leave a device, or return.

    Attributes:
        before: index of the action of the device before which they do.
        leaves: whether they leave.
        stage, microbatch: whose they are.
    """

    before: int
    leaves: bool
    stage: int
    microbatch: int


def called_moves(away: Sequence[Offload]) -> list[Move]:
    """The moves of one device as its process calls them, in order.

    Args:
        away: what is offloaded.
    """
    found = [Move(o.after + 1, True, o.stage, o.microbatch) for o in away]
    found += [Move(o.before, False, o.stage, o.microbatch) for o in away]
    return sorted(found, key=lambda move: (move.before, not move.leaves))


def memory_moves(
    away: Sequence[Offload], starts: Sequence[float], copies: Sequence[HostCopy]
) -> list[Move]:
    """The moves of one device's memory, in order, when its process is as far ahead as it may be.

    Memory is free once the process has waited for its copy, which it does in the next offload. It
    is allocated when the process calls for the copy back, which it may do as soon as the device has
    got to the call before.

    Args:
        away: what is offloaded.
        starts: when each action of the device starts.
        copies: when copies run.
    """
    ends = {(c.stage, c.microbatch): c.end for c in copies if c.out}
    found = []
    places = sorted({o.after + 1 for o in away})
    back = sorted(away, key=lambda o: o.reader)
    for o, following in zip(away, [*away[1:], None], strict=False):
        if following is not None:
            found.append(Move(following.after + 1, True, o.stage, o.microbatch))
            continue
        end = ends[o.stage, o.microbatch]
        later = (i for i in range(o.after + 1, len(starts)) if starts[i] >= end)
        found.append(Move(next(later, len(starts)), True, o.stage, o.microbatch))
    for o, before in zip(back, [None, *back], strict=False):
        left = places[bisect_right(places, o.before) - 1]
        index = max(left, 0 if before is None else before.before)
        found.append(Move(index, False, o.stage, o.microbatch))
    found.sort(key=lambda move: (move.before, not move.leaves))
    return _real(found)


def _real(moves: Sequence[Move]) -> list[Move]:
    """The moves of values that leave before they return."""
    left: set[tuple[int, int]] = set()
    never: set[tuple[int, int]] = set()
    for move in moves:
        key = move.stage, move.microbatch
        if move.leaves:
            left.add(key)
        elif key not in left:
            never.add(key)
    return [move for move in moves if (move.stage, move.microbatch) not in never]


class DeviceCopies:
    """Simulates one device's copies, which run beside its actions, one at a time in each direction.

    As the runtime's (`runtime.offload`): the host waits for the last copy out when it starts the
    next, and a copy back starts when the device has got to its place.

    Args:
        away: what is offloaded.
        seconds: of a copy.

    Attributes:
        copies: so far.
    """

    def __init__(self, away: Sequence[Offload], seconds: Copy) -> None:
        self._seconds = seconds
        self._leaving = {o.after: o for o in away}
        self._returning: dict[int, list[Offload]] = {}
        for o in sorted(away, key=lambda o: o.reader):
            self._returning.setdefault(o.before, []).append(o)
        self._read = {o.reader: o for o in away}
        self._left: dict[tuple[int, int], float] = {}
        self._returned: dict[tuple[int, int], float] = {}
        self._out = self._in = self._host = 0.0
        self.copies: list[HostCopy] = []

    def start_of(self, index: int, start: float) -> float:
        """When an action starts.

        Args:
            index: of the action on its device.
            start: when the action before it has ended.

        Returns:
            The same or a later time.
        """
        for o in self._returning.get(index, ()):
            key = o.stage, o.microbatch
            begin = max(start, self._in, self._left[key])
            self._in = self._returned[key] = begin + self._seconds(*key)
            self.copies.append(HostCopy(*key, False, begin, self._in))
        read = self._read.get(index)
        arrived = 0.0 if read is None else self._returned[read.stage, read.microbatch]
        return max(start, self._host, arrived)

    def ended(self, index: int, end: float) -> None:
        """Say when an action ends."""
        o = self._leaving.get(index)
        if o is None:
            return
        key, before = (o.stage, o.microbatch), self._out
        begin = max(end, self._out)
        self._out = self._left[key] = begin + self._seconds(*key)
        self._host = max(self._host, before)
        self.copies.append(HostCopy(*key, True, begin, self._out))
