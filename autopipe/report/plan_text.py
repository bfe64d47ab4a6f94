"""The text of `print(plan)` and `print(pipe.explain())`: stages, boundary tensors, predictions."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from autopipe.errors import printable
from autopipe.formatting import align_columns, format_bytes, format_seconds, notebook_table

from .columns import STAGE_COLUMNS, columns_of, stage_rows, used_and_limit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autopipe.planning.plan_data import PlanData

NOTEBOOK = ("stage", "device", "parameters", "load", "saves", "memory")
"""Columns of the table in a notebook, which is narrow."""


def plan_text(plan: PlanData) -> str:
    """Format a plan as text.

    Returns:
        A line on the options, the table of stages, the predicted step, the tensors between stages,
        and the notes of capture. Control characters in names are escaped: each is one line.
    """
    samples = " or ".join(str(s) for s in sorted(set(plan.sizes), reverse=True))
    several = f" on {plan.devices} devices" if plan.devices < len(plan.stages) else ""
    lines = [
        f"{len(plan.stages)} stages{several}, {len(plan.sizes)} micro-batches of {samples},"
        f" schedule {plan.schedule}, remat {plan.remat}",
        *_stage_lines(plan),
        *(_device_lines(plan) if several else ()),
        *_prediction_lines(plan),
        *_issue_lines(plan),
        *_crossing_lines(plan),
        *(f"advice: {advice}" for advice in plan.advice),
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(map(printable, lines))


def plan_summary(plan: PlanData) -> str:
    """A plan in one line: ``GPT2LMHeadModel, 2 stages, 4 micro-batches, …``."""
    counts = f"{len(plan.stages)} stages, {len(plan.sizes)} micro-batches"
    step = format_seconds(plan.step_seconds, plan.digits)
    most = format_bytes(max(total.memory_bytes for total in plan.totals))
    return f"{plan.model}, {counts}, predicted step {step}, at most {most} on a device"


def plan_html(plan: PlanData) -> str:
    """A plan for a notebook: its summary, and the most important columns of the stages' table."""
    rows = stage_rows(plan)
    shown = [c for c in columns_of(STAGE_COLUMNS, rows, "text") if c.heading in NOTEBOOK]
    cells = [[c.cell(row) for c in shown] for row in rows]
    notes = "".join(f"<div>{html.escape(printable(line))}</div>" for line in plan.advice)
    return notebook_table(plan_summary(plan), [c.heading for c in shown], cells) + notes


def _stage_lines(plan: PlanData) -> list[str]:
    rows = stage_rows(plan)
    columns = columns_of(STAGE_COLUMNS, rows, "text")
    cells = [[c.heading for c in columns], *([c.cell(row) for c in columns] for row in rows)]
    return align_columns(cells, left=[i for i, c in enumerate(columns) if c.words])


def _device_lines(plan: PlanData) -> list[str]:
    """What the stages of each device need together."""
    rows = [["device", "stages", "saves", "memory"]]
    for d, total in enumerate(plan.totals):
        stages = [str(k) for k, home in enumerate(plan.order.homes) if home == d]
        saves = format_bytes(total.peak_saved_bytes)
        rows.append([str(d), ", ".join(stages), saves, used_and_limit(total)])
    return align_columns(rows, left=[1])


def _prediction_lines(plan: PlanData) -> Iterator[str]:
    bound = "" if plan.gap is None else f"; no cut is more than {plan.gap:.1%} better"
    gathering = (
        f" ({format_seconds(plan.gather_seconds, plan.digits)} to gather results)"
        if plan.gather_seconds
        else ""
    )
    yield (
        f"flops and bytes are those of a micro-batch of {max(plan.sizes)}, memory is all that a"
        f" device needs; balance {plan.balance:.3f} (mean load / largest{bound})"
    )
    yield (
        f"predicted step {format_seconds(plan.step_seconds, plan.digits)}{gathering},"
        f" bubble {plan.timeline.bubble:.1%}"
        f" (times: {', '.join(dict.fromkeys(s.speeds for s in plan.stages))})"
    )


def _issue_lines(plan: PlanData) -> Iterator[str]:
    """What the process does that all devices share, if that is known."""
    if plan.issue_seconds:
        devices = format_seconds(plan.timeline.makespan, plan.digits)
        issued = format_seconds(plan.issue_seconds, plan.digits)
        bound = f", the devices only {devices}: bound by launches" if plan.launch_bound else ""
        yield f"issuing the step's operator calls takes the process {issued}{bound}"


def _crossing_lines(plan: PlanData) -> Iterator[str]:
    crossings = [c for c in plan.crossings if c.source is not None]
    if crossings:
        yield "between stages:"
    for crossing in crossings:
        once = f" {crossing.sent}" if crossing.kind == "parameter" else ""
        yield f"  {crossing}  {format_bytes(crossing.nbytes)}{once}"
