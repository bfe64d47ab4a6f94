"""Clock tables: by hand, and read back."""

from __future__ import annotations

import re

import pytest

from autopipe.errors import OptionError, VerifyError
from autopipe.passes.schedule import KINDS, Action, Scheduled, clock_table, schedule
from autopipe.passes.schedule.simulator import simulate_schedule


def columns(table: str) -> list[list[str]]:
    """The cells of all rows of a table that is cut into several, but not of the line of units."""
    found: dict[str, list[str]] = {}
    for part in table.split("\n\n")[1:]:
        lines = part.splitlines()
        assert lines[0].split()[0] == "unit"
        for line in lines[1:]:
            cells = line.split()
            found.setdefault(" ".join(cells[:2]), []).extend(cells[2:])
    return list(found.values())


def test_1f1b_by_hand() -> None:
    assert clock_table(schedule("1f1b", 2, 2)).splitlines() == [
        "1f1b: 2 stages, 2 micro-batches, 9 units of time",
        "",
        "unit     0      1      2      3      4      5      6      7      8",
        "device 0 F0.0   F0.1   .      .      RBW0.0 -      .      RBW0.1 -",
        "device 1 .      F1.0   RBW1.0 -      F1.1   RBW1.1 -      .      .",
    ]


def test_a_wide_table_is_cut_and_says_so() -> None:
    assert clock_table(schedule("zb-h1", 2, 2), width=37).splitlines() == [
        "zb-h1: 2 stages, 2 micro-batches, 7 units of time; in 2 tables of 4 units at most",
        "",
        "unit     0     1     2     3",
        "device 0 F0.0  F0.1  .     RB0.0",
        "device 1 .     F1.0  RB1.0 F1.1",
        "",
        "unit     4     5     6",
        "device 0 W0.0  RB0.1 W0.1",
        "device 1 RB1.1 W1.0  W1.1",
    ]


@pytest.mark.parametrize("width", [1, 40, 100, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_read_back_is_the_timeline(kind: str, width: int | None) -> None:
    for K, M in [(1, 1), (3, 5), (12, 3)]:
        made = schedule(kind, K, M)
        table = clock_table(made, width)
        timeline = simulate_schedule(made, forward=1, backward=1, weight=1)
        rows = columns(table)
        assert len(rows) == K
        for row, spans in zip(rows, timeline.spans, strict=True):
            assert len(row) == timeline.makespan
            busy = [False] * len(row)
            for span in spans:
                assert row[int(span.start)] == str(span.action)
                assert set(row[int(span.start) + 1 : int(span.end)]) <= {"-"}
                busy[int(span.start) : int(span.end)] = [True] * int(span.end - span.start)
            assert [cell == "." for cell in row] == [not one for one in busy]
        lines = [line for line in table.splitlines()[1:] if line]
        assert width in (1, None) or max(map(len, lines)) <= width
        starts = {tuple(m.start() for m in re.finditer(r"(?<=\S) +\S", line)) for line in lines}
        assert starts
        cut = "tables of" in table.splitlines()[0]
        assert cut == (len(table.split("\n\n")) > 2)
        assert width is not None or not cut


def test_r_by_itself_takes_no_time_and_the_title_says_so() -> None:
    table = clock_table(schedule("zb-h1", 1, 1, early_recompute=True))
    assert table.splitlines() == [
        "zb-h1: 1 stages, 1 micro-batches, 3 units of time; R takes no time and is not shown",
        "",
        "unit     0    1    2",
        "device 0 F0.0 B0.0 W0.0",
    ]


@pytest.mark.parametrize("width", [0, -3, 1.5, "wide"])
def test_widths_that_are_none(width: object) -> None:
    with pytest.raises(OptionError, match="`width`"):
        clock_table(schedule("gpipe", 2, 2), width)  # type: ignore[arg-type]


def test_a_schedule_that_is_not_valid_has_no_table() -> None:
    with pytest.raises(VerifyError):
        clock_table(Scheduled("wrong", 1, 1, ((Action("B", 0, 0),),)))
