"""Simulate a step whose workers share fewer cores than there are workers.

As `autopipe.passes.schedule.simulate_actions`, but an action has work (seconds of a core to itself)
instead of a duration: at each instant the actions that run share the cores equally, none of them
faster than one core. Transfers take no time. A device whose result finds a full queue waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from autopipe.passes.schedule import Action, Scheduled

Work = Callable[[Action], float]
Capacity = Callable[[str, int], int]
"""("F" or "B", the stage that receives) → messages that its queue holds."""

SHORT = 1e-12
"""Seconds of work that are rounding."""


def shared_makespan(scheduled: Scheduled, work: Work, capacity: Capacity, cores: int = 2) -> float:
    """Seconds from the start of the first action to the end of the last.

    Args:
        scheduled: a valid schedule; each device runs its list in order.
        work: seconds of an action on a core to itself.
        capacity: of the queue between a stage and its neighbour.
        cores: that the devices share.

    Raises:
        ValueError: the queues are too small for this schedule.
    """
    step = _Step(scheduled, work, capacity)
    now = 0.0
    while running := step.running():
        rate = min(1.0, cores / len(running))
        least = min(step.left[device] for device in running)
        now += least / rate
        for device in running:
            step.left[device] -= least
    if not step.is_over():
        raise ValueError("the queues are too small for this schedule")
    return now


class _Step:
    """How far each device is.

    Attributes:
        left: for each device, seconds of work of its action.
    """

    def __init__(self, scheduled: Scheduled, work: Work, capacity: Capacity) -> None:
        self._stages, self._rows = scheduled.stages, scheduled.devices
        self._work, self._capacity = work, capacity
        self._at = [0] * len(self._rows)
        self._done: set[Action] = set()  # one letter each
        self._queued: Counter[tuple[str, int]] = Counter()  # messages, by letter and receiver
        self._began: set[Action] = set()
        self.left = [work(row[0]) for row in self._rows]

    def is_over(self) -> bool:
        return all(i == len(row) for i, row in zip(self._at, self._rows, strict=True))

    def running(self) -> list[int]:
        """The devices that compute, once all have started and ended what they can."""
        while any(self._ended(device) for device in range(len(self._rows))):
            pass
        return [d for d, left in enumerate(self.left) if left > SHORT and self._can_run(d)]

    def _can_run(self, device: int) -> bool:
        """Whether the device's action has what it needs; it then takes that from the queues."""
        if self._at[device] == len(self._rows[device]):
            return False
        action = self._rows[device][self._at[device]]
        if action in self._began:
            return True
        if not self._done.issuperset(action.needs(self._stages)):
            return False
        self._began.add(action)
        self._queued.subtract((x, action.stage) for x in action.phase)
        return True

    def _ended(self, device: int) -> bool:
        """Whether the device's action has ended just now."""
        if not self._can_run(device) or self.left[device] > SHORT:
            return False
        row, at = self._rows[device], self._at[device]
        action = row[at]
        steps = {"F": 1, "B": -1}
        sent = [(x, action.stage + steps[x]) for x in action.phase if x in steps]
        sent = [(x, to) for x, to in sent if 0 <= to < self._stages]
        if any(self._queued[queue] >= self._capacity(*queue) for queue in sent):
            return False
        self._queued.update(sent)
        self._done.update(Action(x, action.stage, action.microbatch) for x in action.phase)
        self._at[device] = at + 1
        self.left[device] = self._work(row[at + 1]) if at + 1 < len(row) else 0.0
        return True
