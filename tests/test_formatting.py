"""Numbers as short texts, and rows as aligned lines."""

from __future__ import annotations

import pytest

from autopipe.formatting import (
    align_columns,
    format_bytes,
    format_bytes_short,
    format_count,
    format_seconds,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"), (1.234e-9, "1.23 ns"), (999e-9, "999 ns"), (9.996e-7, "1 µs"), (5e-3, "5 ms"),
        (0.99999, "1 s"), (12.345, "12.3 s"), (1718.2, "1718 s"),
        (-5e-3, "-5 ms"), (float("inf"), "inf s"), (float("-inf"), "-inf s"),
        (float("nan"), "nan s"),
    ],
)  # fmt: skip
def test_seconds(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text", "short"),
    [
        (0, "0 B", "0 B"), (1023, "1023 B", "1023 B"), (1024, "1.0 KiB", "1.0 KiB"),
        (520 * 1024, "520.0 KiB", "520 KiB"), (9_856_000, "9.4 MiB", "9.4 MiB"),
        (3 * 2**50, "3072.0 TiB", "3072 TiB"),
    ],
)  # fmt: skip
def test_bytes(value: int, text: str, short: str) -> None:
    assert format_bytes(value) == text
    assert format_bytes_short(value) == short


def test_counts() -> None:
    values = (7, 1234, 8.36e11, 2e15)
    assert [format_count(v) for v in values] == ["7", "1.23 k", "836 G", "2 P"]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [["n", "device"], ["10", "cpu"]]
    assert align_columns(rows) == [" n  device", "10     cpu"]
    assert align_columns(rows, left=[1]) == [" n  device", "10  cpu"]


def test_cells_do_not_command_the_terminal() -> None:
    """They are as wide as what is shown of them, so columns stay aligned."""
    rows = [["name", "x"], ["\x1b[31m\u202e\n", "1"]]
    assert align_columns(rows, left=[0]) == [
        "name              x",
        "\\x1b[31m\\u202e\\n  1",
    ]
