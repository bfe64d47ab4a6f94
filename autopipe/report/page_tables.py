"""The page's tables: all drawn numbers, and all names, as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from autopipe.formatting import format_bytes, format_seconds

from .columns import STAGE_COLUMNS, Column, columns_of, stage_rows
from .page_data import Part, crossing_ends, memory
from .svg import escape, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.passes.schedule import Span, Timeline
    from autopipe.planning.plan_parts import Crossing
    from autopipe.planning.plans import Plan

    from .page_data import PageData

Row = TypeVar("Row")


def stage_table(facts: PageData) -> str:
    """The table of stages."""
    caption = (
        f"Stages. Counts, times and bytes are those of a micro-batch of {max(facts.plan.sizes)}; "
        "saves: how many micro-batches are kept at once, and what one keeps from forward to "
        "backward; offloads: how many wait in the host's memory, what of one, and the time of a "
        "copy."
    )
    return html_table(caption, STAGE_COLUMNS, stage_rows(facts.plan))


def memory_table(facts: PageData) -> str:
    """The memory of each stage: a column for each part."""
    rows = [(k, memory(stage)) for k, stage in enumerate(facts.plan.stages)]

    def part_column(index: int, part: Part) -> Column[tuple[int, tuple[Part, ...]]]:
        return Column(part.name, lambda row: format_bytes(round(row[1][index].size)))

    parts = [part_column(i, part) for i, part in enumerate(rows[0][1])]
    columns = [Column[tuple[int, tuple[Part, ...]]]("stage", lambda row: str(row[0])), *parts]
    return html_table("Memory on each stage's device.", columns, rows)


CROSSING_COLUMNS: tuple[Column[Crossing], ...] = (
    Column("tensor", lambda c: c.name, words=True, code=True),
    Column("kind", lambda c: c.kind, words=True),
    Column("type and shape", lambda c: c.tensor_type, words=True, code=True),
    Column("from", lambda c: crossing_ends(c)[0], words=True),
    Column("to", lambda c: crossing_ends(c)[1], words=True),
    Column("bytes", lambda c: format_bytes(c.nbytes)),
    Column("sent", lambda c: c.sent, words=True),
)


def crossing_table(facts: PageData) -> str:
    """The tensors that stages receive."""
    return html_table("Tensors that stages receive.", CROSSING_COLUMNS, facts.plan.crossings)


@dataclass(frozen=True)
class DeviceRow:
    """A row of the table of devices: what one device does in the simulated step."""

    device: int
    spans: tuple[Span, ...]
    timeline: Timeline
    plan: Plan

    @property
    def name(self) -> str:
        """What the device is, as planned."""
        stages = (self.plan.stages[k].planned_device for k in self.stages)
        return ", ".join(dict.fromkeys(stages))

    @property
    def stages(self) -> list[int]:
        """The stages on the device."""
        return sorted({span.action.stage for span in self.spans})

    @property
    def busy(self) -> float:
        """Seconds during which it computes."""
        return sum(span.end - span.start for span in self.spans)


DEVICE_COLUMNS: tuple[Column[DeviceRow], ...] = (
    Column("device", lambda r: str(r.device)),
    Column("kind", lambda r: r.name, words=True),
    Column("stages", lambda r: ", ".join(map(str, r.stages))),
    Column("actions", lambda r: str(len(r.spans))),
    Column("first start", lambda r: format_seconds(r.spans[0].start if r.spans else 0.0)),
    Column("last end", lambda r: format_seconds(r.spans[-1].end if r.spans else 0.0)),
    Column("busy", lambda r: format_seconds(r.busy)),
    Column("idle", lambda r: format_seconds(max(0.0, r.timeline.makespan - r.busy))),
    Column("in flight", lambda r: ", ".join(str(r.timeline.in_flight[k]) for k in r.stages)),
)


def device_table(facts: PageData) -> str:
    """The devices of the timeline."""
    line = facts.timeline
    rows = [DeviceRow(device, spans, line, facts.plan) for device, spans in enumerate(line.spans)]
    return html_table("Devices in the simulated step.", DEVICE_COLUMNS, rows)


def chunks_table(facts: PageData) -> str:
    """The points of the chart of step times."""
    own = len(facts.plan.sizes)
    columns: tuple[Column[tuple[int, float]], ...] = (
        Column("micro-batches", lambda point: str(point[0])),
        Column("step", lambda point: format_seconds(point[1], facts.plan.digits)),
        Column(
            "per sample", lambda point: format_seconds(point[1] / facts.batch, facts.plan.digits)
        ),
        Column("", lambda point: " this plan" if point[0] == own else "", words=True),
    )
    return html_table("Predicted times.", columns, facts.step_seconds)


def parameter_lists(facts: PageData) -> str:
    """Names of the parameters of each stage, folded."""
    lists = [
        tag("h3", f"stage {k}")
        + tag("p", ", ".join(map(_code, s.parameters)) or "none", class_="names")
        for k, s in enumerate(facts.plan.stages)
    ]
    return tag("details", tag("summary", "parameters of each stage, by name"), *lists)


def html_table(caption: str, columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    """A table as HTML; the first cell of each row is its header.

    Args:
        caption: its title.
        columns: those that are shown on the page are used.
        rows: the rows from which the columns get their cells.
    """
    columns = columns_of(columns, rows, "page")
    align = ["w" if c.words else None for c in columns]
    top = "".join(
        tag("th", escape(c.heading), scope="col", class_=a)
        for c, a in zip(columns, align, strict=True)
    )
    body = []
    for row in rows:
        first, *rest = (_code(c.cell(row)) if c.code else escape(c.cell(row)) for c in columns)
        others = zip(rest, align[1:], columns[1:], strict=True)
        cells = (tag("td", cell, class_=a, data_label=c.heading) for cell, a, c in others)
        label = columns[0].heading
        header = tag("th", first, scope="row", class_=align[0], data_label=label)
        body.append(tag("tr", header, *cells))
    parts = (
        tag("caption", escape(caption)),
        tag("thead", tag("tr", top)),
        tag("tbody", "".join(body)),
    )
    return tag(
        "div",
        tag("table", *parts),
        class_="scroll",
        tabindex="0",
        role="group",
        aria_label=caption,
    )


def _code(text: str) -> str:
    return tag("code", escape(text))
