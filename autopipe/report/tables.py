"""The page's tables: everything that is drawn, and every name, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .page_data import crossing_ends, load, memory, received, sent
from .svg import count, escape, seconds, tag
from .table import nbytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .page_data import PageData


def stage_table(facts: PageData) -> str:
    """A row a stage."""
    plan = facts.plan
    head = ["stage", "device", "first call", "calls", "parameters", "FLOP", "forward", "recompute"]
    head += ["backward", "load", "receives", "sends", "saves"]
    rows = []
    for k, s in enumerate(plan.stages):
        share = load(plan, k)
        rows.append(
            [
                str(k),
                escape(s.device),
                _name(s.first or "none"),
                f"{s.calls:,}",
                f"{len(s.parameters):,}, {nbytes(s.parameter_bytes)}",
                count(s.flops),
                seconds(s.forward_seconds),
                seconds(s.recompute_seconds),
                seconds(s.backward_seconds),
                "none" if share is None else f"{share:.1%}",
                nbytes(received(plan, k)),
                nbytes(sent(plan, k)),
                f"{s.in_flight} × {nbytes(s.saved_bytes)}",
            ]
        )
    size = max(plan.sizes)
    caption = (
        f"Stages. Counts, times and bytes are those of a micro-batch of {size}; saves: how many "
        "micro-batches are kept at once, and what one keeps from forward to backward."
    )
    return html_table(caption, head, rows, words={1, 2})


def memory_table(facts: PageData) -> str:
    """A row a stage, a column for each part of its memory."""
    parts = [memory(stage) for stage in facts.plan.stages]
    head = ["stage", *(part.name for part in parts[0])]
    rows = [[str(k), *(nbytes(round(p.size)) for p in row)] for k, row in enumerate(parts)]
    return html_table("Memory on each stage's device.", head, rows)


def crossing_table(facts: PageData) -> str:
    """A row a tensor that stages receive."""
    rows = []
    for c in facts.plan.crossings:
        source, target = crossing_ends(c)
        often = "once a step" if c.kind == "parameter" else "each micro-batch"
        rows.append(
            [_name(c.name), escape(c.kind), _name(c.looks), source, target, nbytes(c.nbytes), often]
        )
    head = ["tensor", "kind", "type and shape", "from", "to", "bytes", "sent"]
    return html_table("Tensors that stages receive.", head, rows, words={0, 1, 2, 3, 4, 6})


def device_table(facts: PageData) -> str:
    """A row a device of the timeline."""
    rows = []
    for device, row in enumerate(facts.timeline.spans):
        busy = sum(s.end - s.start for s in row)
        stages = sorted({s.action.stage for s in row})
        idle = facts.timeline.makespan - busy
        rows.append(
            [
                str(device),
                ", ".join(map(str, stages)),
                str(len(row)),
                seconds(row[0].start if row else 0.0),
                seconds(row[-1].end if row else 0.0),
                seconds(busy),
                seconds(max(0.0, idle)),
                ", ".join(str(facts.timeline.in_flight[k]) for k in stages),
            ]
        )
    head = ["device", "stages", "actions", "first start", "last end", "busy", "idle", "in flight"]
    return html_table("Devices in the simulated step.", head, rows)


def chunks_table(facts: PageData) -> str:
    """The points of the line chart."""
    rows = [
        [str(m), seconds(t), seconds(t / facts.batch), " this plan" if m == own else ""]
        for own in [len(facts.plan.sizes)]
        for m, t in facts.step_seconds
    ]
    head = ["micro-batches", "step", "per sample", ""]
    return html_table("Predicted times.", head, rows, words={3})


def parameter_lists(facts: PageData) -> str:
    """Names of the parameters of each stage, folded."""
    lists = [
        tag("h3", f"stage {k}")
        + tag("p", ", ".join(map(_name, s.parameters)) or "none", class_="names")
        for k, s in enumerate(facts.plan.stages)
    ]
    return tag("details", tag("summary", "parameters of each stage, by name"), *lists)


def html_table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    words: frozenset[int] | set[int] = frozenset(),
) -> str:
    """A table whose rows have a header each.

    Args:
        caption, head: text.
        rows: of HTML.
        words: the columns that hold words; the others hold numbers, flush right.
    """
    align = ["w" if i in words else None for i in range(len(head))]
    top = "".join(
        tag("th", escape(h), scope="col", class_=a) for h, a in zip(head, align, strict=True)
    )
    body = "".join(
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=align[0]),
            *(tag("td", cell, class_=a) for cell, a in zip(row[1:], align[1:], strict=True)),
        )
        for row in rows
    )
    inside = (tag("caption", escape(caption)), tag("thead", tag("tr", top)), tag("tbody", body))
    table = tag("table", *inside)
    return tag("div", table, class_="scroll", tabindex="0", role="group", aria_label=caption)


def _name(text: str) -> str:
    return tag("code", escape(text))
