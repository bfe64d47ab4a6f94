"""Format numbers as short texts: bytes, seconds, counts; and rows as aligned lines."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

from autopipe.errors import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SECOND_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
_COUNT_UNITS = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def format_bytes(nbytes: float) -> str:
    """Format a number of bytes in powers of 1024: ``512 B``, ``9.4 MiB``."""
    value, unit = float(nbytes), "B"
    for unit in _BYTE_UNITS:
        if value < 1024 or unit == _BYTE_UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def format_bytes_short(nbytes: float) -> str:
    """Format a number of bytes with at most three digits, for narrow labels: ``520 KiB``."""
    number, unit = format_bytes(nbytes).split()
    return f"{float(number):.0f} {unit}" if len(number) > 4 else f"{number} {unit}"


def format_seconds(seconds: float, digits: int = 3) -> str:
    """Format a time with three significant digits: ``680 ms``, ``212 µs``.

    Args:
        seconds: the time.
        digits: fewer for what is known less exactly; the others are 0 or left out.
    """
    if 0 < abs(seconds) < math.inf and digits < 3:
        seconds = float(f"{seconds:.{digits - 1}e}")
    if seconds == 0:
        return "0 s"
    if not 0 < seconds < math.inf:
        return f"-{format_seconds(-seconds)}" if seconds < 0 else f"{seconds} s"
    for unit, size in _SECOND_UNITS:
        if seconds >= size * 0.9995:
            return f"{seconds / size:.3g} {unit}" if seconds < 999.5 else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns"


def format_count(count: float) -> str:
    """Format a large number with three significant digits: ``1.23 G``."""
    for unit, size in _COUNT_UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def notebook_table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a notebook, as HTML; cells may break, so that it fits a narrow one.

    Args:
        caption: its title.
        headings: one for each column.
        rows: cells as text, which is escaped.
    """
    style = "text-align:left;white-space:normal;overflow-wrap:anywhere;padding:3px 8px 3px 0"

    def line(kind: str, cells: Sequence[str]) -> str:
        written = (f'<{kind} style="{style}">{_escaped(cell)}</{kind}>' for cell in cells)
        return f"<tr>{''.join(written)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return (
        '<table style="max-width:100%;font-size:12px;font-variant-numeric:tabular-nums">'
        f'<caption style="text-align:left">{_escaped(caption)}</caption>'
        f"<thead>{line('th', headings)}</thead><tbody>{body}</tbody></table>"
    )


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def align_columns(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Format rows as lines whose columns are as wide as their widest cell.

    Args:
        rows: cells; all rows have the same number of them. Control characters are escaped.
        left: indices of the columns that are flush left; the others are flush right.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [line.rstrip() for line in lines]
