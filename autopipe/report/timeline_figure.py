"""The simulated step: a row per device, a box per action, coloured by phase, with numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from autopipe.formatting import format_seconds

from .page_data import pieces
from .svg import figure, label, number, rect, tag, ticks, title

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autopipe.passes.schedule import Span
    from autopipe.planning.plans import Plan

    from .page_data import PageData

WIDTH, LEFT, RIGHT, TOP = 1176.0, 62.0, 26.0, 6.0
DIGIT = 6.2
"""Width of a digit of a micro-batch's number."""
EACH = 2_000
"""Above this many actions, those of a device share one path per colour, without tooltips."""

STEPS = tuple(f * 10**i for i in range(6) for f in (1, 2, 5))

NAMES = {"F": "forward", "R": "recompute", "B": "backward", "W": "weight gradients"}


def timeline(facts: PageData) -> str:
    """Draw the timeline; if all times are 0, its rows have no boxes."""
    plan, line = facts.plan, facts.timeline
    rows, K = line.spans, len(line.spans)
    scale = (WIDTH - LEFT - RIGHT) / (line.makespan or 1.0)
    pitch = 30.0 if K <= 16 else 16.0
    bottom = TOP + pitch * K
    parts = []
    for mark in ticks(line.makespan, 8):
        if mark <= line.makespan:
            x = LEFT + mark * scale
            parts.append(tag("path", d=f"M{number(x)} {TOP}V{number(bottom + 4)}", class_="grid"))
            parts.append(label(x, bottom + 17, format_seconds(mark), "tiny faint", "middle"))
    each = sum(map(len, rows)) <= EACH
    for device, row in enumerate(rows):
        y = TOP + pitch * device
        parts.append(label(LEFT - 8, y + pitch / 2 + 4, f"device {device}", "small", "end"))
        parts.append(rect(LEFT, y + 1, line.makespan * scale, pitch - 2, "idle"))
        draw = _boxes if each else _paths
        numbers = (label(LEFT + x, y + pitch / 2 + 4, m, "n", "middle")
                   for x, m in numbers_of(plan, row, scale))  # fmt: skip
        inside = [*draw(plan, row, y + 1, pitch - 2, scale), *numbers]
        parts.append(tag("g", *inside, class_="device", data_device=device))
    words = (
        f"{K} devices over {format_seconds(line.makespan)}: {sum(map(len, rows))} actions, "
        f"coloured by phase; a number is a micro-batch."
    )
    return figure("timeline", "One training step", words, WIDTH, bottom + 22, *parts)


def phases(facts: PageData) -> tuple[str, ...]:
    """The phases that occur in the drawing, in the order of execution."""
    kinds = {(s.action.phase, s.action.stage) for row in facts.timeline.spans for s in row}
    used = {letter for kind in kinds for letter, _ in pieces(facts.plan, *kind)}
    return tuple(letter for letter in NAMES if letter in used)


def _pieces(plan: Plan, span: Span) -> Iterator[tuple[str, float, float]]:
    """The parts of an action as (class, start, end), without gaps."""
    start, length = span.start, span.end - span.start
    parts = pieces(plan, span.action.phase, span.action.stage)
    share = 0.0
    for i, (letter, own) in enumerate(parts):
        share += own
        end = span.end if i == len(parts) - 1 else span.start + share * length
        yield letter, start, end
        start = end


def _class(letter: str, microbatch: int) -> str:
    return f"{letter} odd" if microbatch % 2 else letter


def _boxes(plan: Plan, row: tuple[Span, ...], y: float, height: float, scale: float) -> list[str]:
    drawn = []
    for span in row:
        a = span.action
        words = f"{a}: stage {a.stage}, micro-batch {a.microbatch}, {_words(a.phase)}\n"
        words += f"{format_seconds(span.start)} to {format_seconds(span.end)}"
        drawn.append(
            tag(
                "g",
                title(words),
                *(
                    tag("rect", class_=_class(letter, a.microbatch), x=LEFT + start * scale, y=y,
                        width=(end - start) * scale, height=height)
                    for letter, start, end in _pieces(plan, span)
                ),
                data_action=str(a),
            )
        )  # fmt: skip
    return drawn


def _words(phase: str) -> str:
    if "BW" in phase:
        return ", ".join((["recompute"] if "R" in phase else []) + ["backward"])
    return ", ".join(NAMES[letter] for letter in phase)


def _paths(plan: Plan, row: tuple[Span, ...], y: float, height: float, scale: float) -> list[str]:
    found: dict[str, list[str]] = {}
    for span in row:
        for letter, start, end in _pieces(plan, span):
            box = f"M{number(LEFT + start * scale)} {number(y)}h{number((end - start) * scale)}"
            kind = found.setdefault(_class(letter, span.action.microbatch), [])
            kind.append(f"{box}v{number(height)}H{number(LEFT + start * scale)}z")
    return [tag("path", class_=kind, d="".join(boxes)) for kind, boxes in found.items()]


def numbers_of(plan: Plan, row: tuple[Span, ...], scale: float) -> list[tuple[float, int]]:
    """Choose the numbers that fit in a row: all, or every 2nd, 5th, 10th ...

    A number covers its own box, or also touching boxes of the same colour.

    Args:
        plan: gives the phases' times.
        row: the actions of a device.
        scale: width of a second.

    Returns:
        (x, micro-batch) for each number.
    """
    boxes = [max(_pieces(plan, span), key=lambda piece: piece[2] - piece[1]) for span in row]
    runs: list[tuple[str, float, float]] = []
    run_of: list[int] = []
    for letter, start, end in boxes:
        if runs and runs[-1][0] == letter and (start - runs[-1][2]) * scale < 0.05:
            runs[-1] = (letter, runs[-1][1], end)
        else:
            runs.append((letter, start, end))
        run_of.append(len(runs) - 1)
    by_class: dict[str, list[tuple[float, float, int]]] = {}
    for (letter, start, end), span, run in zip(boxes, row, run_of, strict=True):
        middle = (start + end) / 2
        half = min(middle - runs[run][1], runs[run][2] - middle) if end > start else -1.0
        marks = by_class.setdefault(letter, [])
        marks.append((middle * scale, half * scale, span.action.microbatch))
    found = []
    for marks in by_class.values():
        width = DIGIT * len(str(max(m for *_, m in marks)))
        apart = min((b[0] - a[0] for a, b in pairwise(marks)), default=WIDTH)
        step = next((n for n in STEPS if n * apart >= width + 2), 0)
        for x, half, m in marks:
            if step and m % step == 0 and half >= DIGIT * len(str(m)) / 2:
                found.append((x, m))
    return found
