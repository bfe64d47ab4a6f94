"""The simulator against published bubble rates, closed forms, and timelines broken on purpose."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest

from autopipe.errors import OptionError, VerifyError
from autopipe.passes.schedule.actions import Action, Scheduled
from autopipe.passes.schedule.build import schedule
from autopipe.passes.schedule.kinds import KINDS
from autopipe.passes.schedule.simulator import simulate, simulate_schedule
from autopipe.passes.schedule.timeline import Span, Timeline

SIZES = [(1, 1), (1, 4), (2, 1), (4, 2), (3, 3), (4, 8), (8, 24)]


@pytest.mark.parametrize(("stages", "chunks"), SIZES)
@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_balanced_makespan_and_bubble(kind: str, stages: int, chunks: int) -> None:
    """(M + K - 1)(F + R + B + W), so K - 1 of M + K - 1 slots are idle."""
    timeline = simulate(
        kind, stages=stages, chunks=chunks, forward=3, backward=4, weight=2, recompute=1
    )
    timeline.verify(schedule(kind, stages, chunks))
    assert timeline.makespan == (chunks + stages - 1) * 10
    # Stage 0 runs from the first moment to the last; that is the span.
    assert timeline.bubble == pytest.approx((stages - 1) / (chunks + stages - 1))
    assert timeline.in_flight == schedule(kind, stages, chunks).in_flight()


@pytest.mark.parametrize(("stages", "chunks"), SIZES)
def test_gpipe_speed_up_over_one_device(stages: int, chunks: int) -> None:
    """KM/(M+K-1) × (mean stage / max stage) × (f+b)/(f+b+r), with a first stage twice as slow."""
    slow = [2.0] + [1.0] * (stages - 1)
    f, r, b = slow, slow, [2 * t for t in slow]
    timeline = simulate("gpipe", stages=stages, chunks=chunks, forward=f, backward=b, recompute=r)
    alone = chunks * sum(f + b)
    # The formula takes every stage for the slowest, so it is a bound here, met for equal stages.
    mean = sum(slow) / stages / 2
    bound = stages * chunks / (chunks + stages - 1) * mean * 3 / 4
    assert alone / timeline.makespan >= bound - 1e-9
    equal = simulate("gpipe", stages=stages, chunks=chunks, forward=2, backward=4, recompute=2)
    speed_up = stages * chunks * 6 / equal.makespan
    assert speed_up == pytest.approx(stages * chunks / (chunks + stages - 1) * 3 / 4)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_the_slowest_stage_bounds_the_makespan(kind: str) -> None:
    timeline = simulate(kind, stages=3, chunks=10, forward=[1, 5, 1], backward=[2, 10, 2])
    # The slow stage starts after one forward and ends before one backward. In between it has no
    # break, but with GPipe waits once, while its last micro-batch is forward and its first backward
    # at the stage after.
    assert timeline.makespan == 1 + 10 * 15 + 2 + (1 + 2 if kind == "gpipe" else 0)
    assert timeline.bubble == pytest.approx(1 - 150 / timeline.makespan)


@pytest.mark.parametrize("chunks", [1, 5])
def test_transfers_delay_only_other_devices(chunks: int) -> None:
    apart = simulate("gpipe", stages=3, chunks=chunks, forward=1, backward=2, transfer=0.5)
    assert apart.makespan == (chunks + 2) * 3 + 4 * 0.5
    together = Scheduled(
        "together",
        2,
        1,
        ((Action("F", 0, 0), Action("F", 1, 0), Action("RBW", 1, 0), Action("RBW", 0, 0)),),
    )
    assert simulate_schedule(together, forward=1, backward=2, transfer=0.5).makespan == 6


def test_the_gradient_leaves_when_the_whole_backward_is_done() -> None:
    timeline = simulate("gpipe", stages=2, chunks=1, forward=1, backward=2, weight=4, recompute=8)
    (_, last), (_, first) = timeline.spans
    assert first == Span(Action("RBW", 1, 0), 2, 16)
    assert last == Span(Action("RBW", 0, 0), 16, 30)


def test_inference_is_played_too() -> None:
    forwards = schedule("gpipe", 3, 4, backward=False)
    timeline = simulate_schedule(forwards, forward=2)
    timeline.verify(forwards)
    assert timeline.makespan == (4 + 3 - 1) * 2
    assert timeline.in_flight == (0, 0, 0)


def test_a_step_that_takes_no_time() -> None:
    timeline = simulate("gpipe", stages=2, chunks=2, forward=0, backward=0)
    assert (timeline.makespan, timeline.bubble) == (0, 0)
    assert "makespan 0" in str(timeline)


def test_a_timeline_prints_as_a_gantt_chart() -> None:
    timeline = simulate("gpipe", stages=2, chunks=2, forward=1, backward=1, weight=1)
    lines = str(timeline).splitlines()
    # 9 units in 88 columns
    assert lines[0] == "makespan 9, bubble 0.3333, in flight 2 2"
    assert [len(line) for line in lines[1:]] == [100, 100]
    assert [line[:12] for line in lines[1:]] == ["device 0    ", "device 1    "]
    marks = ["".join(dict.fromkeys(line[12:])) for line in lines[1:]]
    assert marks == ["01.ab", ".01ab"]


@pytest.mark.parametrize(
    "change",
    [
        {"forward": -1.0},
        {"backward": math.nan},
        {"weight": math.inf},
        {"recompute": [1.0]},
        {"forward": [1.0, 1.0, 1.0]},
        {"backward": [1.0, -1.0]},
        {"transfer": -0.1},
        {"saved_bytes": -1.0},
        {"saved_bytes": 1.0, "recomputed_bytes": math.inf},
        {"saved_bytes": 1.0, "weight_bytes": [1.0]},
        {"chunks": 0},
        {"stages": 0},
        {"forward": 1e308},
        {"forward": 10**400},
        {"forward": "12"},
        {"forward": None},
        {"backward": [None, 1.0]},
        {"transfer": 1e308},
        {"saved_bytes": 1e308},
        {"stages": 1e308},
        {"stages": None},
        {"chunks": 2.0},
        {"chunks": 10**400},
        {"stages": 10**30},
        {"virtual_stages": "2"},
        {"virtual_stages": 2},
    ],
)
def test_values_that_are_no_times_are_refused(change: dict[str, object]) -> None:
    arguments = {"stages": 2, "chunks": 2, "forward": 1.0, "backward": 1.0} | change
    with pytest.raises(OptionError):
        simulate("gpipe", **arguments)  # type: ignore[arg-type]


def test_kinds_are_checked() -> None:
    for kind in ("zb-h3", ["gpipe"], None):
        with pytest.raises(OptionError, match="unknown schedule"):
            simulate(kind, stages=2, chunks=2, forward=1, backward=1)  # type: ignore[arg-type]


def test_an_unsound_schedule_is_refused() -> None:
    broken = Scheduled("broken", 1, 1, ((Action("RBW", 0, 0), Action("F", 0, 0)),))
    with pytest.raises(VerifyError, match="can never run"):
        simulate_schedule(broken, forward=1)


SOUND = simulate("gpipe", stages=2, chunks=1, forward=1, backward=1)
(F0, B0), (F1, B1) = SOUND.spans


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            dataclasses.replace(SOUND, spans=((F0, B0), (F1,))),
            "actions are not the schedule's",
        ),
        (
            dataclasses.replace(SOUND, spans=((B0, F0), (F1, B1))),
            "actions are not the schedule's",
        ),
        (
            dataclasses.replace(SOUND, spans=((F0, B0), (dataclasses.replace(F1, start=0.5), B1))),
            "F1.0 on device 1 does not wait for F0.0",
        ),
        (
            dataclasses.replace(SOUND, spans=((F0, B0), (F1, dataclasses.replace(B1, start=1.5)))),
            "RBW1.0 on device 1 overlaps F1.0",
        ),
        (
            dataclasses.replace(SOUND, spans=((dataclasses.replace(F0, start=-1.0), B0), (F1, B1))),
            "F0.0 on device 0 is not within the makespan",
        ),
        (dataclasses.replace(SOUND, makespan=3.0), "is not within the makespan"),
    ],
)
def test_timelines_that_are_wrong_are_caught(wrong: Timeline, message: str) -> None:
    scheduled = schedule("gpipe", 2, 1)
    SOUND.verify(scheduled)
    with pytest.raises(VerifyError, match=message):
        wrong.verify(scheduled)


@pytest.mark.parametrize("kind", KINDS)
def test_thirty_two_stages_take_less_than_a_second(kind: str) -> None:
    """M = 96. Processor time, the best of three, as others may be using the machine."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        simulate(kind, stages=32, chunks=96, forward=2, backward=2, weight=1, saved_bytes=1)
        taken.append(time.process_time() - start)
    assert min(taken) < 1
