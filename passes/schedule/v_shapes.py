"""V-Min and V-Half: V-shaped schedules that hold a third and half of what 1F1B holds.

The V has two stages per device: device k has stage k, on the way down, and stage 2K-1-k, on the way
up. As in ZB-V, a stage is half of a stage of 1F1B.

A *building block* says when one micro-batch runs where, for F = B = W = 1 (arXiv 2405.15362). It is
repeated every 6 units, which is what a micro-batch takes on a device, so no two of a device's six
times may be equal modulo 6. What a device holds then follows from how long a micro-batch is between
F and W, and that from the units between neighbouring devices: if F takes f down and u up, and B
takes u' and d back, with f + d = u + u' = s, every device holds about 2s(K - 1)/6 stages. s = 2 is
the least, V-Min; s = 3 is V-Half.

The repeated block alone has a bubble of about 2s(K - 1), all of it in warm-up and cool-down.
`_fill` uses that time.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schedule_kind import Order, RawAction

PERIOD = 6
"""F, B and W of two stages."""


def v_min(K: int, M: int, v: int) -> Order:
    """V-Min (arXiv 2405.15362): the least memory, with less bubble than 1F1B.

    The stages of a device hold at most 2 floor((K + 4)/3) micro-batches between F and W, so a third
    of 1F1B's memory, 2K.

    Bubble without R, if F = B = W = T/3 and M >= K > 1: at most (4K - 4)T/6; (4K - 7)T/6 if
    M >= 2K - 1 and K mod 3 is not 1. There is no time between actions that wait for one another:
    where B takes longer, or transfers take time, it is larger, and grows with M.

    Args:
        K, M, v: numbers of devices, micro-batches and stages per device.
    """
    block = _Block(hops=(1, 1, 1, 1), waits=(0, 0 if K % 3 else 2, 0))
    return _fill(block, K, M, 2 * ((K + 4) // 3), late_weights=2 * M)


def v_half(K: int, M: int, v: int) -> Order:
    """V-Half (arXiv 2405.15362): half of the memory and half of the bubble of 1F1B.

    The stages of a device hold at most 2 floor((K + 2)/2) micro-batches between F and W, so half of
    1F1B's memory, 2K.

    Bubble without R, if F = B = W = T/3 and M >= K: at most (3K - 3)T/6; if M >= 2K - 1 and K > 2,
    (3K - 4)T/6 for odd K and (3K - 7)T/6 for even K. If times differ, it grows with M unless
    W + 2B >= 2F and W + 2F >= 2B.

    Args:
        K, M, v: numbers of devices, micro-batches and stages per device.
    """
    block = _Block(hops=(2, 1, 2, 1), waits=(0, 0 if K % 2 else 3, 1))
    return _fill(block, K, M, 2 * ((K + 2) // 2), late_weights=K // 2)


@dataclass(frozen=True)
class _Block:
    """When micro-batch 0 runs where, on K devices; micro-batch m runs 6m later.

    Attributes:
        hops: units from device to device of F down, F up, B up and B down.
        waits: units between F down and F up of the device where the V turns, between F up and B up
            of device 0, and between B up and B down of the former.
    """

    hops: tuple[int, int, int, int]
    waits: tuple[int, int, int]

    def times(self, K: int, k: int) -> dict[tuple[str, int], int]:
        """(letter, stage) -> when device k of K starts it.

        W's take the next times that are free modulo 6.
        """
        down, up = k, 2 * K - 1 - k
        start, found = 0, {}
        legs = (("F", down, k), ("F", up, K - 1 - k), ("B", up, k), ("B", down, K - 1 - k))
        for (letter, stage, way), hop, wait in zip(legs, self.hops, (*self.waits, 0), strict=True):
            found[letter, stage] = start + hop * way
            start += hop * (K - 1) + 1 + wait
        for stage in (up, down):
            time = found["B", stage] + 1
            while any((time - taken) % PERIOD == 0 for taken in found.values()):
                time += 1
            found["W", stage] = time
        return found


def _fill(block: _Block, K: int, M: int, limit: int, late_weights: int) -> Order:
    """Repeat a block for M micro-batches, and run early what can run while a device waits.

    In each unit of time, each device runs, of what can start, what comes first in the repeated
    block; towards the end, W's come after F's and B's. An F that would go past others runs only if
    they will still find room: nothing may take the device over the limit when the rest runs as in
    the block. So the limit holds; and the action that comes first in the block, of all that are
    left on all devices, can always run, so there is no deadlock.

    If that takes longer than the repeated block, which happens where M is small, the block's own
    order is returned. So the bubble is never larger than the block's.

    Args:
        block: its own peak is at most `limit`.
        K, M: numbers of devices and micro-batches.
        limit: micro-batches between F and W, both stages of a device together.
        late_weights: W's come last where a device has at most that many F's left. Early on that
            would leave no time between B and what waits for it, so that each delay, of a transfer
            or a longer B, would be one of all devices.
    """
    done = {letter: [0] * (2 * K) for letter in "FBW"}
    times = [block.times(K, k) for k in range(K)]
    devices = [_DeviceOrder(starts, M, limit, late_weights) for starts in times]
    clock, busy = 0, devices
    while busy:
        chosen = [device.choose(done) for device in busy]
        for device, one in zip(busy, chosen, strict=True):
            if one is not None:
                device.run(one, clock)
                done[one.letter][one.stage] += 1
        clock += 1
        busy = [device for device in busy if len(device.order) < M * PERIOD]
    longest = max(max(starts.values()) - min(starts.values()) for starts in times)
    if max(device.last - device.first for device in devices) > longest + (M - 1) * PERIOD:
        return [_repeated(starts, M) for starts in times]
    return [device.order for device in devices]


def _repeated(times: dict[tuple[str, int], int], M: int) -> list[RawAction]:
    """The order of a device in the repeated block."""
    all_times = [
        (time + PERIOD * m, letter, stage, m)
        for (letter, stage), time in times.items()
        for m in range(M)
    ]
    return [(letter, stage, m) for _, letter, stage, m in sorted(all_times)]


@dataclass
class _Head:
    """The next action of a letter at a stage: its micro-batch, and its time in the block."""

    letter: str
    stage: int
    time: int
    microbatch: int = 0


class _DeviceOrder:
    """One device while its order is found.

    Attributes:
        order: what it has run.
        first, last: when it started the first and the last of that.
    """

    def __init__(
        self, times: dict[tuple[str, int], int], M: int, limit: int, late_weights: int
    ) -> None:
        self.order: list[RawAction] = []
        self.first = self.last = -1
        self._M, self._room, self._late_weights = M, limit, late_weights
        self._forwards_left = 2 * M
        heads = [_Head(letter, stage, time) for (letter, stage), time in times.items()]
        self._soon = [head for head in heads if head.letter != "W"]
        self._late = [head for head in heads if head.letter == "W"]

    def choose(self, done: dict[str, list[int]]) -> _Head | None:
        """What to run now, if anything.

        Args:
            done: for each letter and stage, how many micro-batches have ended on any device.
        """
        last = self._forwards_left <= self._late_weights
        for heads in (self._soon, self._late) if last else (self._soon + self._late,):
            found = None
            for head in heads:
                if (
                    (found is None or head.time < found.time)
                    and head.microbatch < self._M
                    and _ready(head, done)
                    and (head.letter != "F" or self._fits(head))
                ):
                    found = head
            if found is not None:
                return found
        return None

    def run(self, head: _Head, clock: int) -> None:
        """Add to the order what `choose` returned."""
        self.order.append((head.letter, head.stage, head.microbatch))
        self._room += {"F": -1, "B": 0, "W": 1}[head.letter]
        self._forwards_left -= head.letter == "F"
        head.time += PERIOD
        head.microbatch += 1
        self.first = clock if len(self.order) == 1 else self.first
        self.last = clock

    def _fits(self, forward: _Head) -> bool:
        """Whether there is room for an F, and still for those of the other stage before it."""
        room = self._room - 1
        if room < 0:
            return False
        (other,) = (h for h in self._soon if h.letter == "F" and h.stage != forward.stage)
        end = min(forward.time, other.time + (self._M - other.microbatch) * PERIOD)
        before = range(other.time, end, PERIOD)
        return len(before) <= room or all(
            count <= room + self._freed(time) for count, time in enumerate(before, 1)
        )

    def _freed(self, time: int) -> int:
        """How many W's come before a time in the block."""
        return sum(
            min(self._M - head.microbatch, max(0, -(-(time - head.time) // PERIOD)))
            for head in self._late
        )


def _ready(head: _Head, done: dict[str, list[int]]) -> bool:
    """Whether all that an action waits for has ended."""
    stage, m = head.stage, head.microbatch
    if head.letter == "F":
        return stage == 0 or done["F"][stage - 1] > m
    if head.letter == "W":
        return done["B"][stage] > m
    last = len(done["B"]) - 1
    return done["F"][stage] > m and (stage == last or done["B"][stage + 1] > m)
