"""A chart of step time against the number of micro-batches, for a constant batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from autopipe.formatting import format_seconds

from .page_data import least_seconds
from .svg import figure, label, number, tag, ticks, title

if TYPE_CHECKING:
    from .page_data import PageData

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 572.0, 290.0, 62.0, 22.0, 18.0, 44.0


def chunks_chart(facts: PageData) -> str:
    """Draw the predicted times as a line, and the lower bound for all M as another."""
    points, least, own = facts.step_seconds, least_seconds(facts), len(facts.plan.sizes)
    marks, digits = ticks(max(t for _, t in points)), facts.plan.digits
    up = (HEIGHT - TOP - BOTTOM) / (marks[-1] or 1.0)
    low, high = math.log2(points[0][0]), math.log2(points[-1][0])
    wide = (WIDTH - LEFT - RIGHT - 40) / ((high - low) or 1.0)

    def x(m: int) -> float:
        return LEFT + 20 + (math.log2(m) - low) * wide

    def y(t: float) -> float:
        return HEIGHT - BOTTOM - t * up

    parts = []
    for mark in marks:
        line = f"M{LEFT} {number(y(mark))}H{WIDTH - RIGHT}"
        parts.append(tag("path", d=line, class_="grid"))
        parts.append(label(LEFT - 8, y(mark) + 4, format_seconds(mark), "tiny faint", "end"))
    parts.append(tag("path", d=f"M{LEFT} {number(y(least))}H{WIDTH - RIGHT}", class_="bound"))
    words = f"largest stage, never waiting: {format_seconds(least, digits)}"
    parts.append(label(WIDTH - RIGHT, y(least) + 14, words, "tiny faint", "end"))
    path = "M" + "L".join(f"{number(x(m))} {number(y(t))}" for m, t in points)
    parts.append(tag("path", d=path, class_="curve"))
    last = -math.inf  # x of the last label
    for m, t in points:
        here = m == own
        words = title(f"M = {m}: {format_seconds(t, digits)}")
        size, class_ = (5.5, "dot own") if here else (3.5, "dot")
        parts.append(tag("circle", words, cx=x(m), cy=y(t), r=size, class_=class_, data_chunks=m))
        if here:
            words, at = (
                f"this plan: {format_seconds(t, digits)}",
                min(max(x(m), LEFT + 52), WIDTH - RIGHT - 52),
            )
            parts.append(label(at, y(t) - 15, words, "small strong halo", "middle"))
        if x(m) - last >= 24 or here:
            parts.append(
                label(x(m), HEIGHT - BOTTOM + 17, m, "tiny own" if here else "tiny", "middle")
            )
            last = x(m)
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        label(middle, HEIGHT - 8, "micro-batches M (each step doubles)", "tiny faint", "middle")
    )
    text = "Predicted step time: " + ", ".join(f"M = {m}: {format_seconds(t)}" for m, t in points)
    return figure("chunks", "Step time against micro-batches", text, WIDTH, HEIGHT, *parts)
