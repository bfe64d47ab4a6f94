"""What the drawings show, measured on them, against the plan and against formulas.

Covers report/bars_figure.py, report/chunks_figure.py, report/graph_figure.py,
report/timeline_figure.py, report/page_data.py and report/svg.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopipe.passes.schedule.actions import Action, Scheduled
from autopipe.passes.schedule.simulator import simulate, simulate_schedule
from autopipe.planning.plans import Plan
from autopipe.report.bars_figure import memory_bars
from autopipe.report.graph_figure import MOST, Bundle, bundles, lanes, stage_graph
from autopipe.report.page import page
from autopipe.report.page_data import PageData, Part, crossing_ends, least_seconds, with_chunks
from autopipe.report.svg import byte_ticks, escape, fit, number, ticks
from autopipe.report.timeline_figure import numbers_of, phases, timeline
from tests.support.pages import Page
from tests.support.plans import crossing, made_plan

WIDE = 1088  # pixels of a step on the timeline
ROUNDING = 0.0051  # coordinates have two decimals

# ------------------------------------------------------------------------------------- the bars


def test_bars_are_as_long_as_the_times() -> None:
    plan = made_plan(7, (2,) * 3)
    drawing = Page(page(plan)).svg("times")
    bars = [b for b in drawing.iter("rect") if "bar" in (b.get("class") or "").split()]
    times = [
        t for s in plan.stages for t in (s.forward_seconds, s.recompute_seconds, s.backward_seconds)
    ]
    widths = [float(b.get("width") or "nan") for b in bars]
    assert len(widths) == len(times) == 21
    scale = sum(widths) / sum(times)
    assert all(abs(w - t * scale) < 2 * ROUNDING for w, t in zip(widths, times, strict=True))
    for start in range(0, 21, 3):  # they touch, from the axis on
        x = [float(b.get("x") or "nan") for b in bars[start : start + 3]]
        assert x[0] == 62
        for i in (0, 1):
            assert abs(x[i] + widths[start + i] - x[i + 1]) < 3 * ROUNDING


def test_bars_are_as_long_as_the_bytes() -> None:
    plan = made_plan(5, (2,) * 3)
    drawing = Page(page(plan)).svg("memory")
    bars = [b for b in drawing.iter("rect") if "bar" in (b.get("class") or "").split()]
    sizes = [
        n
        for s in plan.stages
        for n in (
            s.parameter_bytes + s.buffer_bytes,
            s.optimizer_bytes,
            3 * s.saved_bytes,
            s.peak_bytes - 3 * s.saved_bytes,
        )
    ]
    widths = [float(b.get("width") or "nan") for b in bars]
    assert len(widths) == len(sizes) == 20
    scale = sum(widths) / sum(sizes)
    assert all(abs(w - n * scale) < 2 * ROUNDING for w, n in zip(widths, sizes, strict=True))
    assert sum(sizes[:4]) == plan.stages[0].memory_bytes
    assert [b[0].text for b in bars[:3:2]] == [
        "stage 0, parameters: 4.0 KiB",
        "stage 0, saved for backward, all in flight: 2.9 KiB",
    ]


def test_a_limit_is_a_line_and_what_is_beyond_it_is_marked() -> None:
    rows = [[Part("a", "P", 300.0), Part("b", "K", 100.0)], [Part("a", "P", 150.0)]]
    drawing = Page(memory_bars(rows, 200)).svg("memory")
    (line,) = [p for p in drawing.iter("path") if p.get("class") == "limit"]
    at = float(re.match(r"M([\d.]+)", line.get("d") or "")[1])  # type: ignore[index]
    bars = [b for b in drawing.iter("rect") if "bar" in (b.get("class") or "")]
    ends = [float(b.get("x") or "nan") + float(b.get("width") or "nan") for b in bars]
    assert ends[1] > at > ends[2]
    assert abs((at - 62) / (ends[2] - 62) - 200 / 150) < 1e-3
    over = [t.text for t in drawing.iter("text") if "over" in (t.get("class") or "")]
    assert over == ["400 B", "limit 200 B"]
    free = Page(memory_bars(rows, None)).svg("memory")
    assert not [p for p in free.iter("path") if p.get("class") == "limit"]


# --------------------------------------------------------------------------------- the timeline

PLANS = {
    "gpipe": made_plan(3, (4, 4, 3)),
    "1f1b": made_plan(4, (2,) * 9, schedule="1f1b"),
    "many": made_plan(8, (1,) * 200),
}


def boxes(plan: Plan) -> list[list[tuple[float, float, str]]]:
    """Per device (start, end, colour) in the plan's seconds, as they are drawn."""
    drawing = Page(timeline(PageData(plan))).svg("timeline")
    idle = next(r for r in drawing.iter("rect") if r.get("class") == "idle")
    left = float(idle.get("x") or "nan")
    scale = plan.timeline.makespan / float(idle.get("width") or "nan")
    rows = []
    for row in drawing.iter("g"):
        if row.get("class") != "device":
            continue
        found = [
            (float(r.get("x") or "nan"), float(r.get("width") or "nan"), r.get("class") or "")
            for r in row.iter("rect")
        ]
        for path in row.iter("path"):
            shapes = re.findall(r"M([\d.]+) [\d.]+h([\d.]+)v", path.get("d") or "")
            found += [(float(x), float(w), path.get("class") or "") for x, w in shapes]
        rows.append(
            sorted((scale * (x - left), scale * (x - left + w), c.split()[0]) for x, w, c in found)
        )
    return rows


@pytest.mark.parametrize("name", PLANS)
def test_the_boxes_are_the_spans(name: str) -> None:
    """Each span is one box of its phase, or a recompute and a backward that fill it."""
    plan = PLANS[name]
    line = plan.timeline
    near = 3 * ROUNDING * line.makespan / WIDE
    drawn = boxes(plan)
    assert len(drawn) == len(line.spans)
    for row, spans in zip(drawn, line.spans, strict=True):
        rest = iter(row)
        for span in spans:
            stage = plan.stages[span.action.stage]
            start, end, colour = next(rest)
            assert abs(start - span.start) < near
            if span.action.phase == "RBW":
                assert colour == "R"
                assert abs(end - start - stage.recompute_seconds) < near
                again, end, colour = next(rest)
                assert colour == "B"
                assert abs(again - start - stage.recompute_seconds) < near
            else:
                assert colour == span.action.phase.replace("BW", "B")
            assert abs(end - span.end) < near
        assert list(rest) == []


def test_each_action_says_what_it_is_until_they_are_too_many() -> None:
    drawing = Page(timeline(PageData(PLANS["gpipe"]))).svg("timeline")
    actions = Counter(g.get("data-action") for g in drawing.iter("g") if g.get("data-action"))
    expected = Counter(str(s.action) for row in PLANS["gpipe"].timeline.spans for s in row)
    assert actions == expected
    hover = [g[0].text or "" for g in drawing.iter("g") if g.get("data-action") == "RBW2.2"]
    assert hover[0].startswith("RBW2.2: stage 2, micro-batch 2, recompute, backward\n")
    assert len(timeline(PageData(PLANS["many"]))) < 60 * 3200  # bytes for each of its actions


def test_phases_that_run_apart_have_colours_of_their_own() -> None:
    """Two stages, R, B and W as actions, W when there is time for it."""
    rows = (
        "F0.0 F0.1 R0.0 B0.0 W0.0 R0.1 B0.1 W0.1",
        "F1.0 RB1.0 F1.1 W1.0 RBW1.1",
    )
    actions = tuple(
        tuple(
            Action(*(f(x) for f, x in zip((str, int, int), found, strict=True)))
            for found in re.findall(r"([A-Z]+)(\d)\.(\d)", row)
        )
        for row in rows
    )
    line = simulate_schedule(
        Scheduled("own", 2, 2, actions), forward=2, recompute=2, backward=4, weight=1
    )
    facts = PageData(made_plan(2, (1, 1)))
    vars(facts)["timeline"] = line
    assert phases(facts) == ("F", "R", "B", "W")
    drawn = [
        [(r.get("class") or "").split()[0] for r in g.iter("rect")]
        for g in Page(timeline(facts)).svg("timeline").iter("g")
        if g.get("data-action")
    ]
    assert drawn == [
        *([["F"], ["F"], ["R"], ["B"], ["W"], ["R"], ["B"], ["W"]]),
        *([["F"], ["R", "B"], ["F"], ["W"], ["R", "B"]]),
    ]


@pytest.mark.parametrize("name", PLANS)
def test_numbers_do_not_touch_one_another_and_stand_on_their_colour(name: str) -> None:
    plan = PLANS[name]
    scale = WIDE / plan.timeline.makespan
    shown = 0
    for row, drawn in zip(plan.timeline.spans, boxes(plan), strict=True):
        at = sorted(numbers_of(plan, row, scale))
        shown += len(at)
        for (x, m), (y, n) in pairwise(at):
            assert y - x >= 5.8 * (len(str(m)) + len(str(n))) / 2
        for x, m in at:
            (owner,) = {
                s.action.microbatch for s in row if s.start <= x / scale <= s.end
            }  # fmt: skip
            assert owner == m
            half = 2.9 * len(str(m)) / scale
            under = {c for a, b, c in drawn if a < x / scale + half and b > x / scale - half}
            assert len(under) == 1
    assert shown >= 8


# ------------------------------------------------------------------------------------- the graph


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 6), st.sets(st.integers(0, 7), min_size=1)), max_size=30))
def test_arcs_of_one_lane_share_no_stage_between(ends: list[tuple[int, set[int]]]) -> None:
    arcs = [
        Bundle(source, tuple(sorted(targets)), (crossing(f"c{i}", 0, 1),))
        for i, (source, targets) in enumerate(ends)
        if min(targets) > source
    ]
    lane = lanes(arcs)
    assert set(lane) == set(arcs)
    for a in arcs:
        for b in arcs:
            if a is not b and lane[a] == lane[b]:
                over = [set(range(x.source * 2 + 1, max(x.targets) * 2)) for x in (a, b)]
                assert not over[0] & over[1]


def test_arcs_that_follow_one_another_share_a_lane() -> None:
    ends = {"a": (0, 2), "b": (2, 4), "c": (1, 3), "d": (0, 4)}
    arcs = {name: Bundle(k, (to,), (crossing(name, k, to),)) for name, (k, to) in ends.items()}
    found = lanes(list(arcs.values()))
    assert {name: found[arc] for name, arc in arcs.items()} == {"a": 0, "b": 0, "c": 1, "d": 2}


def test_every_way_is_drawn_once_and_bundled() -> None:
    sent = [crossing("x", None, 0), crossing("a", 0, 1), crossing("b", 0, 1, nbytes=9)]
    sent += [crossing("s", 0, 2), crossing("m", 0, 1, 2), crossing("w", 0, 2, kind="parameter")]
    drawing, left_out = stage_graph(PageData(made_plan(3, crossings=sent)))
    root = Page(drawing).svg("graph")
    ways = {
        (g.get("class"), g.get("data-from"), g.get("data-to")): g[0].text or ""
        for g in root.iter("g")
        if g.get("data-from")
    }
    assert set(ways) == {
        ("edge", "-1", "0"),
        ("edge", "0", "1"),
        ("arc", "0", "2"),
        ("arc", "0", "1 2"),
        ("arc shared", "0", "2"),
    }
    assert ways["edge", "0", "1"].startswith("stage 0 → stage 1: 1.0 KiB\n")
    assert "b  float32[B, 16]  9 B" in ways["edge", "0", "1"]
    assert left_out == 0


def test_the_smallest_of_too_many_arcs_are_left_out_and_counted() -> None:
    sent = [crossing(f"s{k}", k, k + 2, nbytes=1000 + k) for k in range(MOST + 5)]
    plan = made_plan(MOST + 7, crossings=sent)
    drawing, left_out = stage_graph(PageData(plan))
    drawn = {g.get("data-from") for g in Page(drawing).svg("graph").iter("g")} - {None}
    assert left_out == 5
    assert drawn == {str(k) for k in range(5, MOST + 5)}
    assert "5 smaller arcs beyond the largest" in page(plan)
    assert len(bundles(sent)) == MOST + 5


@pytest.mark.parametrize(
    ("targets", "words"),
    [((1,), "stage 1"), ((2, 1), "stages 1, 2"), ((1, 2, 3, 5), "stages 1–3, 5"), ((), "")],
)
def test_ends_in_words(targets: tuple[int, ...], words: str) -> None:
    assert crossing_ends(crossing("c", 0, *targets)) == ("stage 0", words)


# -------------------------------------------------------------------------- time against chunks


@pytest.mark.parametrize("remat", ["full", "none"])
def test_step_times_are_gpipes_formula(remat: str) -> None:
    """Equal stages: (M + K - 1)(F + B) + MR, each in proportion to the samples.

    While a stage waits for its first gradient, it recomputes.
    """
    K, batch = 4, 48
    plan = made_plan(K, (6,) * 8, remat=remat)
    same = plan.stages[0]
    names = [f"first{k}" for k in range(K)]
    stages = tuple(type(same)(**{**vars(same), "first": name}) for name in names)
    facts = PageData(Plan(**{**{f: getattr(plan, f) for f in vars(plan)}, "stages": stages}))
    sample, again = same.seconds / 6, same.recompute_seconds / 6
    times = dict(facts.step_seconds)
    assert list(times) == [1, 2, 4, 8, 16, 32]
    for M, found in times.items():
        total = (M + K - 1) * (sample - again) + M * again
        assert found == pytest.approx(total * batch / M)
    assert least_seconds(facts) == pytest.approx(sample * batch)
    assert all(t > least_seconds(facts) for t in times.values())


def test_the_plans_own_time_is_its_timelines() -> None:
    plan = made_plan(3, (4, 4, 3))
    times = dict(PageData(plan).step_seconds)
    assert list(times) == [1, 2, 3, 4, 8]
    assert times[3] == plan.timeline.makespan
    whole = [11 / 4 * s.forward_seconds for s in plan.stages]
    alone = simulate(
        "gpipe",
        stages=3,
        chunks=1,
        forward=whole,
        backward=[2.5 * f for f in whole],
        recompute=whole,
        early_recompute=True,
    )
    assert times[1] == pytest.approx(alone.makespan)
    assert with_chunks(plan, 99).sizes == (1,) * 11


# ------------------------------------------------------------------------------------ primitives


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-9, 1e9))
def test_ticks_are_round_even_and_reach_the_largest(largest: float) -> None:
    marks = ticks(largest)
    assert marks[0] == 0
    assert marks[-1] >= largest * 0.998
    assert 3 <= len(marks) <= 7
    step = marks[1]
    assert all(b - a == pytest.approx(step) for a, b in pairwise(marks))
    tens = 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(step / tens == pytest.approx(m) for m in (1, 2, 2.5, 5))


def test_ticks_of_bytes_are_round_in_their_unit() -> None:
    assert byte_ticks(5 * 2**30) == tuple(i * 2**30 for i in range(6))
    assert byte_ticks(0) == ticks(0) == (0.0,)


def test_text_is_escaped_and_shortened() -> None:
    assert [number(v) for v in (1.0, -0.001, 2.345, 100.0)] == ["1", "0", "2.35", "100"]
    assert fit("abcdef", 100, 10) == "abcdef"
    assert fit("abcdefghij" * 20, 57, 10) == "abcde…ghij"
    assert fit("abc", 0, 10) == ""
    assert escape("<a b='c'>&\x07") == "&lt;a b=&#x27;c&#x27;&gt;&amp;\ufffd"
