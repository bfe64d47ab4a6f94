"""Timelines as a chart and as a trace file that is read back."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from typing import Any

import pytest

from autopipe.errors import OptionError, VerifyError
from autopipe.passes.schedule.actions import Action, Scheduled
from autopipe.passes.schedule.kinds import KINDS
from autopipe.passes.schedule.simulator import simulate
from autopipe.passes.schedule.timeline import Span, Timeline


def events(text: str) -> dict[int, list[dict[str, Any]]]:
    """The complete events of a trace, per thread in order of time."""
    found: dict[int, list[dict[str, Any]]] = {}
    for event in json.loads(text)["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault(event["tid"], []).append(event)
    return {tid: sorted(row, key=lambda e: e["ts"]) for tid, row in found.items()}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_read_back_is_the_timeline(kind: str, early: bool) -> None:
    timeline = simulate(
        kind,
        stages=3,
        chunks=5,
        forward=[2, 4, 6],
        backward=4,
        weight=2,
        recompute=2,
        transfer=1,
        early_recompute=early,
    )
    found = events(timeline.to_chrome_trace(microseconds=1e3))
    assert sorted(found) == [0, 1, 2]
    for device, row in enumerate(timeline.spans):
        mine = found[device]
        assert [e["name"] for e in mine] == [str(span.action) for span in row]
        assert [e["cat"] for e in mine] == [span.action.phase for span in row]
        assert [e["args"] for e in mine] == [
            {"stage": s.action.stage, "microbatch": s.action.microbatch} for s in row
        ]
        # Integers and halves: no rounding, so times can be compared as they are.
        assert [e["ts"] for e in mine] == [span.start * 1000 for span in row]
        assert [e["dur"] for e in mine] == [(span.end - span.start) * 1000 for span in row]
        for one, two in pairwise(mine):
            assert one["ts"] + one["dur"] <= two["ts"]
    end = max(e["ts"] + e["dur"] for row in found.values() for e in row)
    assert end == timeline.makespan * 1000


def test_threads_are_named_after_devices_and_units_are_seconds() -> None:
    timeline = simulate("gpipe", stages=2, chunks=1, forward=1, backward=2)
    trace = json.loads(timeline.to_chrome_trace())
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names == {0: "device 0", 1: "device 1"}
    assert [e["dur"] for e in events(timeline.to_chrome_trace())[0]] == [1e6, 2e6]
    assert trace["displayTimeUnit"] == "ms"


def test_kinds_of_action_have_colours_of_their_own() -> None:
    early = simulate(
        "zb-h1",
        stages=1,
        chunks=2,
        forward=1,
        backward=1,
        weight=1,
        recompute=1,
        early_recompute=True,
    )
    colours = {e["cat"]: e["cname"] for e in events(early.to_chrome_trace())[0]}
    assert set(colours) == {"F", "R", "B", "W"}
    assert len(set(colours.values())) == 4


@pytest.mark.parametrize("unit", [0.0, -1.0, float("inf"), float("nan")])
def test_units_of_no_length_are_refused(unit: float) -> None:
    timeline = simulate("gpipe", stages=1, chunks=1, forward=1, backward=2)
    with pytest.raises(OptionError, match="`microseconds`"):
        timeline.to_chrome_trace(microseconds=unit)


def test_phases_apart_have_marks_of_their_own() -> None:
    timeline = simulate(
        "zb-h1",
        stages=1,
        chunks=1,
        forward=1,
        recompute=1,
        backward=1,
        weight=1,
        early_recompute=True,
        saved_bytes=3,
    )
    title, row = str(timeline).splitlines()
    assert title == "makespan 4, bubble 0.0000, in flight 1, peak bytes 3"
    assert "".join(dict.fromkeys(row[12:])) == "0'aA"


def measured() -> Timeline:
    """F, a pause, then RBW, which waits first: as if it had been measured."""
    forward = Span(Action("F", 0, 0), 0.0, 2.0, sent=1.5)
    backward = Span(Action("RBW", 0, 0), 4.0, 10.0, ((4.0, 6.0), (9.0, 9.5)), 6.0, 9.5)
    return Timeline(10.0, 0.0, ((forward, backward),), (1,), pause=(2.0, 4.0))


def test_waits_are_not_busy() -> None:
    line = measured()
    assert [span.busy for span in line.spans[0]] == [2.0, 3.5]
    assert (line.busy, line.waiting, line.pause_length) == ((5.5,), (2.5,), 2.0)
    assert simulate("gpipe", stages=1, chunks=1, forward=1, backward=2).pause_length == 0


def test_waits_and_the_pause_are_drawn_and_traced() -> None:
    (row,) = measured().chart(20.0)
    assert [row[12:].count(mark) for mark in "0-a."] == [9, 10, 16, 53]
    trace = json.loads(measured().to_chrome_trace(1.0))["traceEvents"]
    drawn = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in trace if e["ph"] == "X"]
    assert drawn == [
        ("F0.0", 0, 0.0, 2.0),
        ("RBW0.0", 0, 4.0, 6.0),
        ("wait", 0, 4.0, 2.0),
        ("wait", 0, 9.0, 0.5),
        ("between the passes", 1, 2.0, 2.0),
    ]
    names = {(e["name"], e["tid"]): e["args"]["name"] for e in trace if e["ph"] == "M"}
    assert names == {("thread_name", 0): "device 0", ("thread_name", 1): "caller"}
    named = measured().trace_events(1.0, process=3, name="measured")
    assert {e["pid"] for e in named} == {3}
    assert named[0]["args"] == {"name": "measured"}


def test_a_message_may_be_used_before_its_sender_has_ended() -> None:
    """What follows the last message (saving values) delays nobody."""
    scheduled = Scheduled("made", 2, 1, ((Action("F", 0, 0),), (Action("F", 1, 0),)))
    sender = Span(Action("F", 0, 0), 0.0, 3.0, sent=2.0)
    waiter = Span(Action("F", 1, 0), 0.0, 4.0, ((0.0, 2.5),), 2.5)
    Timeline(4.0, 0.0, ((sender,), (waiter,)), (0, 0)).verify(scheduled)
    early = dataclasses.replace(waiter, arrived=1.5)
    with pytest.raises(VerifyError, match=r"F1\.0 on device 1 does not wait for F0\.0"):
        Timeline(4.0, 0.0, ((sender,), (early,)), (0, 0)).verify(scheduled)
