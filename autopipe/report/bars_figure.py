"""Bar charts with one stacked bar per stage: times, or bytes against a limit."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from autopipe.formatting import format_bytes, format_seconds

from .svg import byte_ticks, figure, label, number, rect, tag, ticks, title

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .page_data import Part

WIDTH, LEFT, RIGHT, TOP = 572.0, 62.0, 70.0, 24.0


def time_bars(rows: Sequence[Sequence[Part]], digits: int = 3) -> str:
    """Draw the times of each stage.

    Args:
        rows: for each stage, its parts in seconds.
        digits: significant digits of the times.
    """
    largest = max(sum(p.size for p in row) for row in rows)
    words = "Predicted time of one micro-batch in each stage: forward, recompute, backward."
    write = partial(format_seconds, digits=digits)
    return _bars("times", "Time per stage", words, rows, ticks(largest), write)


def memory_bars(rows: Sequence[Sequence[Part]], limit: int | None) -> str:
    """Draw the memory of each stage.

    Args:
        rows: for each stage, its parts in bytes.
        limit: bytes at which a line is drawn; None: no line.
    """
    largest = max(sum(p.size for p in row) for row in rows)
    words = "Bytes that the plan knows of in each stage."
    marks = byte_ticks(max(largest, limit or 0))
    return _bars("memory", "Memory per stage", words, rows, marks, _bytes, limit)


def _bars(
    name: str,
    heading: str,
    words: str,
    rows: Sequence[Sequence[Part]],
    marks: tuple[float, ...],
    write: Callable[[float], str],
    limit: int | None = None,
) -> str:
    pitch = 26.0 if len(rows) <= 16 else 15.0
    bar, bottom = pitch - 6, TOP + pitch * len(rows)
    scale = (WIDTH - LEFT - RIGHT) / (marks[-1] or 1.0)
    parts = []
    for mark in marks:
        x = LEFT + mark * scale
        parts.append(tag("path", d=f"M{number(x)} {TOP - 4}V{number(bottom)}", class_="grid"))
        parts.append(label(x, TOP - 10, write(mark), "tiny faint", "middle"))
    for k, row in enumerate(rows):
        x, y = LEFT, TOP + pitch * k + 3
        total = sum(part.size for part in row)
        over = limit is not None and total > limit
        parts.append(label(LEFT - 8, y + bar / 2 + 4, f"stage {k}", "small", "end"))
        for part in row:
            if part.size > 0:
                words_here = title(f"stage {k}, {part.name}: {write(part.size)}")
                parts.append(rect(x, y, part.size * scale, bar, f"bar {part.class_}", words_here))
                x += part.size * scale
        parts.append(label(x + 6, y + bar / 2 + 4, write(total), "tiny over" if over else "tiny"))
    if limit is not None:
        x = LEFT + limit * scale
        parts.append(tag("path", d=f"M{number(x)} {TOP - 4}V{number(bottom)}", class_="limit"))
        parts.append(label(x - 5, bottom + 13, f"limit {format_bytes(limit)}", "tiny over", "end"))
    return figure(name, heading, words, WIDTH, bottom + (20 if limit is not None else 4), *parts)


def _bytes(value: float) -> str:
    return format_bytes(round(value))
