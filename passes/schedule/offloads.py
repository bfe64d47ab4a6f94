"""Where offloading stands in a schedule: which micro-batches leave their device, when they return.

What F of a micro-batch has saved leaves after F, and comes back one action before the one that reads
it, so that the copy runs beside that action. A micro-batch that is read soon after its forward stays:
it would return at once. (The idea: PipeOffload, arXiv 2503.01328.)
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple

from .actions import Scheduled

LEAST_DISTANCE = 3
"""From F to the reader, in actions of the device. If it is 2, the copy back would start when the copy
out does; if it is 1, before it."""


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
        For each device, in the order of `after`. No two return in another order than they are read
        in. Where all forwards come before all other actions, which then are a function of their own
        (`backward_start`), everything returns in that function.
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
