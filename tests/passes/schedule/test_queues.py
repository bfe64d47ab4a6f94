"""Sizes of queues with which a schedule runs to its end."""

from __future__ import annotations

import pytest

from autopipe.errors import VerifyError
from autopipe.passes.schedule import (
    KINDS,
    Action,
    Queue,
    Scheduled,
    StageMessages,
    queue_sizes,
    schedule,
)


def chain(stages: int, skips: bool = False) -> list[StageMessages]:
    """Each stage sends to the next one, and gradients back; with `skips` the first to all."""
    pairs = [(k, k + 1) for k in range(stages - 1)]
    pairs += [(0, k) for k in range(2, stages)] if skips else []
    return [
        StageMessages(
            received={
                "F": [Queue(f"x{a}", a, b) for a, b in pairs if b == k],
                "B": [Queue(f"grad x{a}", b, a) for a, b in pairs if a == k],
            },
            sent={
                "F": [Queue(f"x{a}", a, b) for a, b in pairs if a == k],
                "B": [Queue(f"grad x{a}", b, a) for a, b in pairs if b == k],
            },
        )
        for k in range(stages)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(("K", "M"), [(1, 3), (2, 5), (4, 9), (4, 2)])
def test_every_kind_runs_with_queues_of_a_few_messages(
    kind: str, skips: bool, K: int, M: int
) -> None:
    planned = schedule(kind, K, M)
    sizes = queue_sizes(planned, chain(planned.stages, skips), lambda source, to: 1)
    assert all(1 <= size <= M for size in sizes.values())


def test_gpipe_needs_no_more_than_the_least() -> None:
    sizes = queue_sizes(schedule("gpipe", 3, 8), chain(3), lambda source, to: abs(to - source) + 1)
    assert set(sizes.values()) == {2}


def test_a_queue_is_enlarged_where_sender_and_receiver_would_wait_for_each_other() -> None:
    """Stage 1 of the same device runs only after three forwards of stage 0."""
    row = [Action("F", 0, m) for m in range(3)] + [Action("F", 1, m) for m in range(3)]
    planned = Scheduled("own", 2, 3, (tuple(row),))
    sizes = queue_sizes(planned, chain(2), lambda source, to: 1)
    assert sizes[Queue("x0", 0, 1)] == 3


def test_a_message_that_nothing_sends() -> None:
    planned = schedule("gpipe", 2, 2, backward=False)
    first, second = chain(2)
    with pytest.raises(VerifyError, match="stage 1 waits forever for x0 of micro-batch 0"):
        queue_sizes(planned, [first._replace(sent={}), second], lambda source, to: 1)
