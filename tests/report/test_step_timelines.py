"""Measured beside predicted: text, trace file, page.

Covers report/measured_section.py.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from autopipe.errors import OptionError
from autopipe.passes.schedule.build import schedule
from autopipe.planning.measured import Measured
from autopipe.planning.measured_timeline import measured_timeline
from autopipe.report.step_timelines import StepTimelines
from autopipe.runtime.recording import RecordedTimes
from tests.support.measuring import made_measured
from tests.support.pages import Page
from tests.support.plans import made_plan

PLAN = made_plan(2, (4, 4, 4))
SECONDS = [{"F": 0.002, "RBW": 0.006}, {"F": 0.004, "RBW": 0.008}]


def lines(chunks: int = 3) -> StepTimelines:
    plan = made_plan(2, (4,) * chunks)
    measured = made_measured(plan, [SECONDS])
    return StepTimelines(plan, measured.found.scheduled, measured)


def paused() -> Measured:
    """One step with waits and with the caller's time between its passes."""
    measured = made_measured(made_plan(2, (4,)), [SECONDS])
    scheduled = schedule("gpipe", 2, 1)
    rows = (
        (
            RecordedTimes("forward_0", 0, 0.0, 0.003, (), None, 0.003),
            RecordedTimes("backward_0", 0, 0.006, 0.014, ((0.006, 0.010),), 0.010, None),
        ),
        (
            RecordedTimes("forward_1", 0, 0.0, 0.005, ((0.0, 0.003),), 0.003, None),
            RecordedTimes("backward_1", 0, 0.006, 0.010, (), None, 0.010),
        ),
    )
    line = measured_timeline(scheduled, rows, passes=2)
    steps = dataclasses.replace(measured.found, steps=(line,))
    measured.complete(steps, others=0, unfinished=0)
    return measured


def test_a_trace_has_a_process_for_each_timeline() -> None:
    events = json.loads(lines().to_chrome_trace())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "measured", 1: "predicted", 2: "simulated"}
    for process in names:
        own = [e for e in events if e["pid"] == process and e["ph"] == "X"]
        assert len(own) == 2 * 2 * 3
        assert {e["tid"] for e in own} == {0, 1}
    ends = {p: max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] == p)
            for p in names}  # fmt: skip
    assert ends[0] == pytest.approx(lines().timelines["measured"].makespan * 1e6)
    predicted = PLAN.simulated(schedule("gpipe", 2, 3))
    assert ends[1] == pytest.approx(predicted.makespan * 1e6)
    with pytest.raises(OptionError, match="microseconds"):
        lines().to_chrome_trace(0)


def test_the_text_has_charts_on_one_scale() -> None:
    text = str(lines())
    charts = [line for line in text.splitlines() if line.startswith("device ")][1:]
    assert len(charts) == 2 * 3
    # The predicted step is the longest.
    measured, predicted = (charts[i][12:].rstrip(".") for i in (0, 2))
    assert len(predicted) == 88
    assert len(measured) == round(88 * 44 / 49.5)
    assert "measured: 44 ms" in text
    assert repr(lines()) == "StepTimelines(measured 44 ms, predicted 49.5 ms, simulated 44 ms)"


@pytest.mark.parametrize("chunks", [3, 800], ids=["boxes", "paths"])
def test_the_page_draws_both(chunks: int) -> None:
    found = Page(lines(chunks).to_html())
    drawing = found.svg("measured")
    rows = [g for g in drawing.iter("g") if g.get("class") == "device"]
    assert [g.get("data-device") for g in rows] == ["0", "1"] * 3
    titles = [t.text or "" for t in drawing.iter("text") if "strong" in (t.get("class") or "")]
    assert [t.split(":")[0] for t in titles] == ["measured", "simulated", "predicted"]
    captions = [e.text for e in found.named("caption")]
    assert {"The step.", "Devices in the median step."} <= set(captions)


def test_waits_and_the_callers_time_are_drawn() -> None:
    measured = paused()
    found = Page(StepTimelines(measured.plan, measured.found.scheduled, measured).to_html())
    drawing = found.svg("measured")
    assert len([p for p in drawing.iter("path") if p.get("class") == "wait"]) == 2
    (pause,) = [r for r in drawing.iter("rect") if r.get("class") == "pause"]
    *_, width, height = map(float, (drawing.get("viewBox") or "").split())
    for box in drawing.iter("rect"):
        x, y, w, h = (float(box.get(a) or "nan") for a in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width + 0.02
        assert 0 <= y <= y + h <= height
    assert "1 ms" in (pause[0].text or "")
    assert "caller, between the passes" in str(measured)


def test_a_page_without_a_measurement_is_as_before() -> None:
    predicted = StepTimelines(PLAN, schedule("gpipe", 2, 3), None)
    assert "Measured beside" not in predicted.to_html()
    assert list(predicted.timelines) == ["predicted"]
