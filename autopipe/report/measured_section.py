"""The part of the page on measured steps: measured and predicted timelines, and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.formatting import format_seconds

from .columns import Column
from .measured_text import device_rows, notes, phase_rows, step_rows
from .page_tables import html_table
from .svg import escape, tag
from .timeline_figure import NAMES, drawing, phases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.planning.measured_data import MeasuredData

    from .page_data import PageData


def measured_section(facts: PageData, measured: MeasuredData) -> str:
    """Draw the median step below the predicted one, on one scale.

    Args:
        facts: the plan.
        measured: steps that ran by it.
    """
    line, predicted, simulated = measured.timeline, measured.predicted, measured.simulated
    count = len(measured.steps)
    note = (
        f"{count} step{'s' * (count > 1)} measured; the median one is drawn. A grey box is a wait "
        "for a message, or for space in a queue, within an action. Simulated: the schedule with "
        "the measured times of phases, without any other loss."
    )
    lines = {
        f"measured: {format_seconds(line.makespan)}": line,
        f"simulated: {format_seconds(simulated.makespan)}": simulated,
        f"predicted: {format_seconds(predicted.makespan)}": predicted,
    }
    words = f"{', '.join(lines)}: a row per device, a box per action, on one scale of time."
    legend = tag(
        "ul",
        *(tag("li", tag("i", class_=a), NAMES[a]) for a in phases(facts)),
        tag("li", tag("i", class_="wait"), "waiting"),
        *([tag("li", tag("i", class_="pause"), "caller, between the passes")] * bool(line.pause)),
        tag("li", tag("i", class_="idle"), "idle"),
        class_="legend",
    )
    enlarge = tag("label", tag("input", type="checkbox"), " enlarge", class_="enlarge")
    return tag(
        "section",
        tag("h2", "Measured beside predicted"),
        tag("p", escape(note), class_="note"),
        enlarge,
        legend,
        drawing(facts.plan, lines, "measured", "Measured and predicted step", words),
        _table("The step.", step_rows(measured)),
        _table("Devices in the median step.", device_rows(measured)),
        _table("Phases of each stage, for one micro-batch.", phase_rows(measured)),
        tag("ul", *(tag("li", escape(line)) for line in notes(measured)), class_="notes"),
    )


def _table(caption: str, rows: Sequence[tuple[str, ...]]) -> str:
    """A table of texts, whose first row is its headings."""
    headings, *others = rows
    columns = [_column(i, heading) for i, heading in enumerate(headings)]
    return html_table(caption, columns, others)


def _column(index: int, heading: str) -> Column[tuple[str, ...]]:
    return Column(heading, lambda row: row[index])
