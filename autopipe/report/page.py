"""A plan as one HTML page: no scripts, nothing loaded, readable without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.formatting import format_bytes, format_seconds

from .bars_figure import memory_bars, time_bars
from .chunks_figure import chunks_chart
from .graph_figure import MOST, stage_graph
from .measured_section import measured_section
from .page_data import CAVEAT, PageData, check, memory, times
from .page_tables import (
    chunks_table,
    crossing_table,
    device_table,
    memory_table,
    parameter_lists,
    stage_table,
)
from .style import STYLE
from .svg import escape, tag
from .timeline_figure import NAMES, phases, timeline

if TYPE_CHECKING:
    from autopipe.planning.measured_data import MeasuredData
    from autopipe.planning.plans import Plan

    from .page_data import Part

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy: the browser runs and loads nothing, even if names contain code."""


def page(plan: Plan, measured: MeasuredData | None = None) -> str:
    """Write a plan as a self-contained HTML document: figures, drawings, tables.

    Names in the plan are escaped; the page has no scripts and forbids them.

    Args:
        plan: what to draw.
        measured: steps of this plan that were measured, to draw beside it.

    Raises:
        UnsupportedError: the plan's schedule cannot be simulated.
        PlanError: its numbers are too large or too small to be drawn.
    """
    facts = PageData(plan)
    check(facts)
    name = escape(plan.model)
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name} in {len(plan.stages)} stages"),
        tag("style", STYLE),
    ]
    body = [
        _header(plan),
        _figures(facts),
        _graph(facts),
        tag("div", _times(facts), _memory(facts), class_="pair"),
        _timeline(facts),
        "" if measured is None else measured_section(facts, measured),
        _chunks(facts),
        _tables(facts),
        _notes(plan),
        tag("footer", f"Made by autopipe from a plan. Graph <code>{escape(plan.graph)}</code>."),
    ]
    html = tag("html", tag("head", *head), tag("body", tag("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{html}\n"


def _header(plan: Plan) -> str:
    mode = "training" if plan.training else "evaluation"
    lead = (
        f"{_many(len(plan.stages), 'stage')}, schedule {plan.schedule}, "
        f"rematerialization {plan.remat}, captured in {mode} mode, on "
        f"{', '.join(dict.fromkeys(s.planned_device for s in plan.stages))} "
        f"(times: {', '.join(dict.fromkeys(s.speeds for s in plan.stages))})"
    )
    return tag(
        "header",
        tag("h1", escape(plan.model)),
        tag("p", escape(lead), class_="lead"),
    )


def _figures(facts: PageData) -> str:
    plan, line = facts.plan, facts.timeline
    sizes = " or ".join(str(s) for s in sorted(set(plan.sizes), reverse=True))
    parameters = sum(s.parameter_bytes for s in plan.stages)
    largest = max(s.parameter_bytes for s in plan.stages)
    shown = [
        ("stages", str(len(plan.stages)), _many(sum(s.calls for s in plan.stages), "call")),
        (
            "micro-batches",
            str(len(plan.sizes)),
            f"of {_many_samples(sizes)}, {facts.batch} a batch",
        ),
        (
            "step time",
            format_seconds(plan.step_seconds, plan.digits),
            f"predicted{_gathering(plan)}",
        ),
        ("per sample", format_seconds(plan.step_seconds / facts.batch, plan.digits), "predicted"),
        ("bubble", f"{line.bubble:.1%}", "of the pipeline's time idle"),
        ("balance", f"{plan.balance:.3f}", f"mean stage over largest{_gap(plan)}"),
        ("parameters", format_bytes(parameters), f"largest stage {format_bytes(largest)}"),
    ]
    return tag(
        "dl",
        *(
            tag("div", tag("dt", what), tag("dd", escape(value), tag("small", escape(more))))
            for what, value, more in shown
        ),
    )


def _gathering(plan: Plan) -> str:
    """The part of a step that is not on the timeline."""
    return (
        f", {format_seconds(plan.gather_seconds, plan.digits)} to gather results"
        if plan.gather_seconds
        else ""
    )


def _gap(plan: Plan) -> str:
    """How far the cut may be from the best possible, if that is known."""
    return "" if plan.gap is None else f"; no cut is more than {plan.gap:.1%} better"


def _graph(facts: PageData) -> str:
    drawing, left_out = stage_graph(facts)
    note = (
        "Bytes of one micro-batch, on the way forward; gradients go back the same way. "
        "Arcs pass over stages that do not touch the tensor; dashed below, parameters that several "
        "stages use, sent once a step. Bars are a stage's time against the largest."
    )
    if left_out:
        note += (
            f" {_many(left_out, 'smaller arc')} beyond the largest {MOST} not drawn: see Tensors."
        )
    return _section("Stages", note, drawing)


def _times(facts: PageData) -> str:
    rows = [times(stage) for stage in facts.plan.stages]
    note = f"One micro-batch of {max(facts.plan.sizes)}. {CAVEAT}"
    return _section("Time per stage", note, _legend(rows), time_bars(rows, facts.plan.digits))


def _memory(facts: PageData) -> str:
    rows = [memory(stage) for stage in facts.plan.stages]
    note = "All that a stage needs on its device; what kernels use within a call is not known."
    note += " No limit was set." if facts.limit_bytes is None else " The line is the limit."
    bars = memory_bars(rows, facts.limit_bytes)
    return _section("Memory per stage", note, _legend(rows), bars, _folded(memory_table(facts)))


def _timeline(facts: PageData) -> str:
    note = (
        "One training step as simulated: a row a device, a box an action, its number the "
        "micro-batch."
    )
    letters = phases(facts)
    legend = tag(
        "ul",
        *(tag("li", tag("i", class_=a), NAMES[a]) for a in letters),
        tag("li", tag("i", class_="idle"), "idle"),
        class_="legend",
    )
    enlarge = tag("label", tag("input", type="checkbox"), " enlarge", class_="enlarge")
    parts = (enlarge, legend, timeline(facts), _folded(device_table(facts)))
    return _section("Timeline", note, *parts)


def _chunks(facts: PageData) -> str:
    sizes = facts.plan.sizes
    if len(facts.step_seconds) < 2:
        return ""
    note = (
        f"The same batch of {facts.batch} and the same cut in more or fewer micro-batches, "
        "simulated. Assumed: a stage's time is proportional to the samples of a micro-batch, all "
        "micro-batches are equal, and nothing is lost per call or transfer. On a device small "
        "micro-batches cost more, so the measured line turns up again at some M."
    )
    if min(sizes) < max(sizes):
        note += (
            f" This plan's have {max(sizes)} or {min(sizes)} samples; all count as {max(sizes)}."
        )
    both = tag("div", chunks_chart(facts), chunks_table(facts), class_="pair")
    return _section("How many micro-batches?", note, both)


def _tables(facts: PageData) -> str:
    count = len(facts.plan.crossings)
    stages = tag(
        "section", tag("h2", "Stage by stage"), stage_table(facts), parameter_lists(facts),
        class_="long",
    )  # fmt: skip
    if not count:
        return stages
    crossing = tag("section", tag("h2", "Tensors"), crossing_table(facts), class_="long")
    return stages + crossing


def _notes(plan: Plan) -> str:
    lines = [*plan.advice, *plan.notes]
    if not lines:
        return ""
    notes = tag("ul", *(tag("li", escape(line)) for line in lines), class_="notes")
    return tag("section", tag("h2", "Notes"), notes)


def _section(heading: str, note: str, *parts: str) -> str:
    return tag("section", tag("h2", heading), tag("p", escape(note), class_="note"), *parts)


def _legend(rows: list[tuple[Part, ...]]) -> str:
    used = [
        (part.class_, part.name)
        for i, part in enumerate(rows[0])
        if any(row[i].size > 0 for row in rows)
    ]
    return tag(
        "ul", *(tag("li", tag("i", class_=a), escape(name)) for a, name in used), class_="legend"
    )


def _folded(table: str) -> str:
    return tag("details", tag("summary", "as a table"), table)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _many_samples(sizes: str) -> str:
    return "1 sample" if sizes == "1" else f"{sizes} samples"
