"""Timelines as a chart and as a trace file that is read back."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from autopipe.errors import OptionError
from autopipe.passes.schedule.kinds import KINDS
from autopipe.passes.schedule.simulator import simulate


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
