"""Where offloading stands in schedules, and how long its copies take: numbers by hand, and an
independent simulation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from autopipe.passes.schedule import (
    Offload,
    Scheduled,
    Timeline,
    called_moves,
    memory_moves,
    offloads,
    schedule,
    schedule_for,
    simulate_actions,
)

KINDS = ("gpipe", "1f1b", "zb-h1", "zb-h2", "interleaved", "zb-v", "v-half", "v-min")


def scheduled(kind: str, K: int, M: int) -> Scheduled:
    return schedule_for(kind, K, 2 if kind == "interleaved" else None).scheduled(M)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("K", "M"), [(1, 1), (2, 8), (4, 8), (5, 20)])
def test_what_is_offloaded_is_away_while_its_device_does_something_else(
    kind: str, K: int, M: int
) -> None:
    made = scheduled(kind, K, M)
    stages = {k for k in range(made.stages) if k % 3 != 1}
    for row, found in zip(made.devices, offloads(made, stages), strict=True):
        away = {(o.stage, o.microbatch): o for o in found}
        assert len(away) == len(found)
        for k, m in {(a.stage, a.microbatch) for a in row}:
            own = [i for i, a in enumerate(row) if (a.stage, a.microbatch) == (k, m)]
            after, reader = own[:2]
            assert row[after].phase == "F"
            if k in stages and reader - after > 3:
                o = away.pop((k, m))
                assert (o.after, o.reader) == (after, reader)
                first = next(i for i, a in enumerate(row) if a.phase != "F")
                forwards_first = all(a.phase != "F" for a in row[first:])
                whole = kind == "gpipe" or (forwards_first and K == M == 1)
                assert o.before == max(reader - 1, first if whole else 0)
        assert away == {}


def test_the_last_stage_of_1f1b_offloads_nothing() -> None:
    found = offloads(schedule("1f1b", 4, 16), range(4))
    assert [len(row) for row in found] == [16, 14, 0, 0]
    assert found[0][0] == Offload(0, 0, 0, 3, 4)


def test_inference_offloads_nothing() -> None:
    assert offloads(schedule("gpipe", 2, 4, backward=False), {0, 1}) == ((), ())


def simulated(made: Scheduled, seconds: float) -> Timeline:
    return simulate_actions(
        made,
        lambda phase, k, m: float(len(phase)),
        lambda letter, source, to, m: 0.0,
        offloads(made, range(made.stages)),
        lambda k, m: seconds,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fast_copies_hide_behind_computation(kind: str) -> None:
    """F takes one unit and a copy at most as long; but gpipe's first backward has to wait."""
    made = scheduled(kind, 4, 16)
    none = simulated(made, 0.0)
    assert (
        none.makespan
        == simulate_actions(made, lambda phase, k, m: float(len(phase)), lambda *a: 0.0).makespan
    )
    found = simulated(made, 0.9)
    waits = 4 * 0.9 if kind == "gpipe" else 0.0
    assert none.makespan <= found.makespan <= none.makespan + waits + 1e-9
    found.verify(made)


def test_slow_copies_are_what_a_step_waits_for() -> None:
    """One device, F of 1 and RBW of 3, copies of 10, all four worked out by hand.

    Out: 1-11, 11-21, 21-31, 31-41. The host waits in the second offload for the first copy, so F2
    starts at 11, F3 at 21. B0 waits for the copy back, which starts when F3 ends (at 22) and its
    own copy out has ended: 22-32, then 32-42, 42-52, 52-62.
    """
    line = simulated(schedule("gpipe", 1, 4), 10.0)
    assert [(c.microbatch, c.start, c.end) for c in line.copies[0] if c.out] == [
        *((0, 1.0, 11.0), (1, 11.0, 21.0), (2, 21.0, 31.0), (3, 31.0, 41.0))
    ]
    assert [(c.microbatch, c.start, c.end) for c in line.copies[0] if not c.out] == [
        *((0, 22.0, 32.0), (1, 32.0, 42.0), (2, 42.0, 52.0), (3, 52.0, 62.0))
    ]
    starts = [span.start for span in line.spans[0]]
    assert starts == [0.0, 1.0, 11.0, 21.0, 32.0, 42.0, 52.0, 62.0]
    events = line.trace_events(1.0)
    assert sum(e["name"] == "offload 0.2" for e in events) == 1
    names = [e["args"] for e in events if e["name"] == "thread_name"]
    assert {"name": "device 0 to the host"} in names


def test_a_device_copies_one_at_a_time_in_each_direction() -> None:
    generator = random.Random(0)
    for kind in KINDS:
        made = scheduled(kind, 3, 9)
        line = simulated(made, generator.uniform(0.1, 5.0))
        for row, away, copies in zip(
            line.spans, offloads(made, range(made.stages)), line.copies, strict=True
        ):
            for out in (True, False):
                own = sorted((c.start, c.end) for c in copies if c.out == out)
                assert len(own) == len(away)
                assert all(a[1] <= b[0] for a, b in pairwise(own))
            ends = {(c.stage, c.microbatch, c.out): c for c in copies}
            lasts: Sequence[float] = sorted(c.end for c in copies if c.out)
            for n, o in enumerate(away):
                key = o.stage, o.microbatch
                assert ends[(*key, True)].start >= row[o.after].end
                assert ends[(*key, False)].start >= ends[(*key, True)].end
                assert o.before == 0 or ends[(*key, False)].start >= row[o.before - 1].end
                assert row[o.reader].start >= ends[(*key, False)].end
                if n:  # the host waited for the copy before
                    assert row[o.after + 1].start >= lasts[n - 1]


def test_moves_by_hand() -> None:
    """GPipe on one device, four micro-batches: F0 F1 F2 F3 B0 B1 B2 B3."""
    made = schedule("gpipe", 1, 4)
    (away,) = offloads(made, {0})
    called = [(move.before, move.leaves, move.microbatch) for move in called_moves(away)]
    assert called == [
        *((1, True, 0), (2, True, 1), (3, True, 2), (4, True, 3)),
        *((4, False, 0), (4, False, 1), (5, False, 2), (6, False, 3)),
    ]
    line = simulated(made, 0.5)
    starts = [span.start for span in line.spans[0]]
    found = memory_moves(away, starts, line.copies[0])
    assert [(move.before, move.leaves, move.microbatch) for move in found] == [
        *((2, True, 0), (3, True, 1), (4, True, 2), (4, True, 3)),
        *((4, False, 0), (4, False, 1), (4, False, 2), (5, False, 3)),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [0.0, 0.5, 3.0])
def test_memory_is_there_whenever_it_is_used(kind: str, seconds: float) -> None:
    """It leaves no sooner than its copy has ended, and is back when its copy back starts."""
    made = scheduled(kind, 4, 16)
    line = simulated(made, seconds)
    for row, away, copies in zip(
        line.spans, offloads(made, range(made.stages)), line.copies, strict=True
    ):
        moves = memory_moves(away, [span.start for span in row], copies)
        found = {(m.stage, m.microbatch, m.leaves): m.before for m in moves}
        times = {(c.stage, c.microbatch, c.out): c for c in copies}
        for o in away:
            key = o.stage, o.microbatch
            if (*key, True) not in found:  # never gone
                continue
            left, back = found[(*key, True)], found[(*key, False)]
            assert o.after < left <= back <= o.before
            if left < len(row):
                assert row[left].start >= times[(*key, True)].end
