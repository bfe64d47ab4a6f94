"""How many messages each queue between two stages needs, so that no device waits forever.

A queue is bounded, so that no sender fills the memory of a receiver that is late: a device that
sends waits while the queue is full. In some orders that would be a deadlock, since the receiver
waits for the sender too. `queue_sizes` executes the schedule step by step, with full queues that
block, and enlarges a queue only where everything waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from autopipe.errors import VerifyError

from .actions import Action, Scheduled


class Queue(NamedTuple):
    """Messages of one value, from one stage to another; one per micro-batch.

    Attributes:
        value: its name.
        source: the stage that sends it.
        to: the stage that receives it.
    """

    value: str
    source: int
    to: int


class StageMessages(NamedTuple):
    """What the actions of a stage receive and send, in their order.

    Attributes:
        received: letter of the phase, "F" or "B" -> what arrives before it runs.
        sent: likewise -> what is sent after it.
    """

    received: Mapping[str, Sequence[Queue]]
    sent: Mapping[str, Sequence[Queue]]


def queue_sizes(
    scheduled: Scheduled, messages: Sequence[StageMessages], least: Callable[[int, int], int]
) -> dict[Queue, int]:
    """Find sizes of queues with which a schedule runs to its end.

    Args:
        scheduled: a valid schedule.
        messages: for each stage.
        least: (sending stage, receiving stage) -> the size that their queues have at least.

    Returns:
        For each queue its size, in messages.

    Raises:
        VerifyError: no size is enough: a message is received that nothing sends before.
    """
    sizes = {q: least(q.source, q.to) for t in messages for qs in t.sent.values() for q in qs}
    steps = [[s for a in row for s in _steps(a, messages[a.stage])] for row in scheduled.devices]
    at = [0] * len(steps)
    sent: set[tuple[Queue, int]] = set()
    waiting: Counter[Queue] = Counter()
    while True:
        moved = False
        for device, row in enumerate(steps):
            while at[device] < len(row):
                sends, queue, m = row[at[device]]
                if sends and waiting[queue] < sizes[queue]:
                    sent.add((queue, m))
                    waiting[queue] += 1
                elif not sends and (queue, m) in sent:
                    waiting[queue] -= 1
                else:
                    break
                at[device] += 1
                moved = True
        stuck = [row[i] for row, i in zip(steps, at, strict=True) if i < len(row)]
        if not stuck:
            return sizes
        if not moved:
            full = [queue for sends, queue, _ in stuck if sends]
            if not full:
                _, queue, m = stuck[0]
                raise VerifyError(
                    f"stage {queue.to} waits forever for {queue.value} of micro-batch {m}",
                    expected=f"stage {queue.source} sends it before",
                )
            sizes[full[0]] += 1


def _steps(action: Action, messages: StageMessages) -> list[tuple[bool, Queue, int]]:
    """(whether it sends, queue, micro-batch) for each message of an action."""
    letters = [x for x in action.phase if x in "FB"]
    m = action.microbatch
    received = [(False, q, m) for x in letters for q in messages.received.get(x, ())]
    return received + [(True, q, m) for x in letters for q in messages.sent.get(x, ())]
