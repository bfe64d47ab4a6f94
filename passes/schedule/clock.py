"""A schedule as a table: what each device runs in each unit of time."""

from __future__ import annotations

from autopipe.errors import OptionError, shown

from .actions import Scheduled
from .simulator import simulate_actions

IDLE, GOES_ON = ".", "-"


def clock_table(scheduled: Scheduled, width: int | None = 100) -> str:
    """Draw a schedule as a table, a column for each unit of time and a row for each device.

    F, B and W take a unit each. R takes none, as a part of its B or by itself; then it has no cell.
    An action stands where it starts; ``-`` is its other units, ``.`` a unit in which the device
    waits.

    Args:
        scheduled: a valid schedule.
        width: characters of a line. A table with longer lines is cut into several, and the title
            says so. A column at least is always shown. None: no limit.

    Raises:
        OptionError: `width` is not an integer >= 1.
        VerifyError: the schedule is not valid.
    """
    if width is not None and (not hasattr(type(width), "__index__") or width < 1):
        raise OptionError("`width`", expected="an integer >= 1, or None", found=shown(width))
    timeline = simulate_actions(
        scheduled,
        lambda phase, stage, m: float(len(phase.replace("R", ""))),
        lambda letter, source, to, m: 0.0,
    )
    units = round(timeline.makespan)
    cells = [[IDLE] * units for _ in timeline.spans]
    for row, spans in zip(cells, timeline.spans, strict=True):
        for span in spans:
            start, end = round(span.start), round(span.end)
            row[start:end] = [str(span.action), *[GOES_ON] * (end - start - 1)][: end - start]
    labels = ["unit", *[f"device {device}" for device in range(len(cells))]]
    label = max(map(len, labels))
    column = max(len(cell) for row in [*cells, [str(units)]] for cell in row)
    fit = units if width is None else max(1, (width - label) // (column + 1))
    tables = [
        "\n".join(
            " ".join([f"{name:{label}}", *[f"{cell:{column}}" for cell in row]]).rstrip()
            for name, row in zip(
                labels,
                [list(map(str, range(first, min(first + fit, units)))), *_part(cells, first, fit)],
                strict=True,
            )
        )
        for first in range(0, units, fit)
    ]
    return "\n\n".join([_title(scheduled, units, len(tables), fit), *tables])


def _part(cells: list[list[str]], first: int, count: int) -> list[list[str]]:
    """Some columns of a table."""
    return [row[first : first + count] for row in cells]


def _title(scheduled: Scheduled, units: int, tables: int, fit: int) -> str:
    title = (
        f"{scheduled.kind}: {scheduled.stages} stages, {scheduled.chunks} micro-batches,"
        f" {units} units of time"
    )
    if any(action.phase == "R" for row in scheduled.devices for action in row):
        title += "; R takes no time and is not shown"
    return title + (f"; in {tables} tables of {fit} units at most" if tables > 1 else "")
