"""Schedules as CSV, in the format "compute_only" of torch.distributed.pipelining.

A row per device, a cell per action: stage, letter, micro-batch. An empty cell is a step in which
the device waits.

| cell | here | |
|---|---|---|
| ``0F1`` | F | forward |
| ``0B1`` | RBW, BW | whole backward |
| ``0I1`` | RB, B | gradients of inputs |
| ``0W1`` | W | gradients of parameters |

The format has no rematerialization: an R as an action of its own is not written, and each B that is
read has its R as its first part.
"""

from __future__ import annotations

import csv
import io
import re

from autopipe.errors import OptionError, shown

from .actions import Scheduled
from .simulator import simulate_actions
from .user_schedule import scheduled_from_lists

_CELL_LETTERS = {"F": "F", "BW": "B", "RBW": "B", "B": "I", "RB": "I", "W": "W"}
_LETTERS = {"F": "F", "B": "BW", "I": "B", "W": "W"}
_CELL = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")
_OTHER = re.compile(r"OVERLAP_F_B|UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B")


def write_schedule(scheduled: Scheduled) -> str:
    """Write a schedule for torch: ``_PipelineScheduleRuntime._load_csv(path, "compute_only")``.

    A column is a step in which each device runs at most one action. An action is in the first
    column in which it can run, so what it waits for is further left, as ``PipelineScheduleMulti``
    needs it, which sends after each step. Torch refuses a schedule without backwards.

    Args:
        scheduled: a valid schedule.

    Returns:
        The text, a line per device.

    Raises:
        VerifyError: the schedule is not valid.
    """
    timeline = simulate_actions(
        scheduled, lambda phase, stage, m: float(phase != "R"), lambda letter, source, to, m: 0.0
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for spans in timeline.spans:
        cells: list[str] = []
        for span in spans:
            action = span.action
            if action.phase in _CELL_LETTERS:
                cells += [""] * (int(span.start) - len(cells))
                letter = _CELL_LETTERS[action.phase]
                cells.append(f"{action.stage}{letter}{action.microbatch}")
        writer.writerow(cells)
    return text.getvalue()


def read_schedule(text: str, name: str = "csv") -> Scheduled:
    """Read what torch or `write_schedule` has written; see the table above.

    Args:
        text: a line per device, in the order of devices. Empty cells are skipped.
        name: of the schedule, for messages.

    Returns:
        The schedule, verified.

    Raises:
        OptionError: text that is not CSV; a cell that is no action, or one of those that torch adds
            to run a schedule (``0SEND_F1``) or overlaps (``OVERLAP_F_B``), by its row and column,
            which start at 1; or a schedule that is not valid: device d is row d + 1.
    """
    if not isinstance(text, str):
        raise OptionError("a schedule as CSV", expected="a text", found=shown(text))
    rows = []
    try:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise OptionError(f"schedule {name!r} is no CSV", found=str(error)) from None
    for row, cells in enumerate(lines, 1):
        found = [
            _action(f"schedule {name!r}, row {row}, column {column}", cell.strip())
            for column, cell in enumerate(cells, 1)
            if cell.strip()
        ]
        if not found:
            expected = "at least one action"
            raise OptionError(f"schedule {name!r}, row {row}: no actions", expected=expected)
        rows.append(found)
    if not rows:
        raise OptionError(f"schedule {name!r}: no rows", expected="a row of actions per device")
    return scheduled_from_lists(name, rows)


def _action(where: str, cell: str) -> tuple[str, int, int]:
    """A cell's letters, stage and micro-batch."""
    match = _CELL.fullmatch(cell)
    if match:
        return _LETTERS[match[2]], int(match[1]), int(match[3])
    if other := _OTHER.search(cell):
        raise OptionError(
            f"{where}: {other[0]} is not an action of one stage that computes",
            expected="forwards (F) and backwards (B, or I and W) alone",
            found=shown(cell),
            remedy='write the file with format="compute_only", and of a schedule without overlaps',
        )
    expected = "stage, letter (F, B, I or W), micro-batch, such as 0F1; or an empty cell"
    raise OptionError(f"{where} is no action", expected=expected, found=shown(cell))
