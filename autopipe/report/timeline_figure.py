"""A step, simulated or measured: a row per device, a box per action, coloured by phase."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from autopipe.formatting import format_seconds

from .page_data import pieces
from .svg import figure, label, number, rect, tag, ticks, title

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from autopipe.passes.schedule import Span, Timeline
    from autopipe.planning.plans import Plan

    from .page_data import PageData

WIDTH, LEFT, RIGHT, TOP = 1176.0, 62.0, 26.0, 6.0
TITLE = 24.0
"""Height of a timeline's title."""
DIGIT = 6.2
"""Width of a digit of a micro-batch's number."""
EACH = 2_000
"""Above this many actions, those of a device share one path per colour, without tooltips."""

STEPS = tuple(f * 10**i for i in range(6) for f in (1, 2, 5))

NAMES = {"F": "forward", "R": "recompute", "B": "backward", "W": "weight gradients"}


def timeline(facts: PageData) -> str:
    """Draw the timeline; if all times are 0, its rows have no boxes."""
    line = facts.timeline
    words = (
        f"{len(line.spans)} devices over {format_seconds(line.makespan)}: "
        f"{sum(map(len, line.spans))} actions, coloured by phase; a number is a micro-batch."
    )
    return drawing(facts.plan, {"": line}, "timeline", "One training step", words)


def drawing(
    plan: Plan, lines: Mapping[str, Timeline], name: str, heading: str, summary: str
) -> str:
    """Draw timelines below one another, on one scale.

    Args:
        plan: gives the phases' times, by which actions are divided.
        lines: by title; "" for none.
        name, heading, summary: see `figure`.
    """
    longest = max(line.makespan for line in lines.values())
    scale = (WIDTH - LEFT - RIGHT) / (longest or 1.0)
    count = sum(len(line.spans) for line in lines.values())
    pitch = 30.0 if count <= 32 else 16.0
    bottom = TOP + sum(pitch * len(line.spans) + TITLE * bool(at) for at, line in lines.items())
    parts = []
    for mark in ticks(longest, 8):
        if mark <= longest:
            x = LEFT + mark * scale
            parts.append(tag("path", d=f"M{number(x)} {TOP}V{number(bottom + 4)}", class_="grid"))
            parts.append(label(x, bottom + 17, format_seconds(mark), "tiny faint", "middle"))
    top = TOP
    for words, line in lines.items():
        if words:
            parts.append(label(LEFT, top + TITLE - 6, words, "small strong halo"))
            top += TITLE
        parts += _rows(plan, line, top, pitch, scale)
        top += pitch * len(line.spans)
    return figure(name, heading, summary, WIDTH, bottom + 22, *parts)


def _rows(plan: Plan, line: Timeline, top: float, pitch: float, scale: float) -> list[str]:
    """The rows of one timeline."""
    parts = []
    draw = _boxes if sum(map(len, line.spans)) <= EACH else _paths
    for device, row in enumerate(line.spans):
        y = top + pitch * device
        parts.append(label(LEFT - 8, y + pitch / 2 + 4, f"device {device}", "small", "end"))
        parts.append(rect(LEFT, y + 1, line.makespan * scale, pitch - 2, "idle"))
        numbers = (label(LEFT + x, y + pitch / 2 + 4, m, "n", "middle")
                   for x, m in numbers_of(plan, row, scale))  # fmt: skip
        inside = [*draw(plan, row, y + 1, pitch - 2, scale), *_waits(row, y + 1, pitch - 2, scale)]
        parts.append(tag("g", *inside, *numbers, class_="device", data_device=device))
    if line.pause is not None:
        start, end = line.pause
        words = title(f"the caller, between the passes: {format_seconds(end - start)}")
        width, height = (end - start) * scale, pitch * len(line.spans) - 2
        parts.append(rect(LEFT + start * scale, top + 1, width, height, "pause", words))
    return parts


def _waits(row: tuple[Span, ...], y: float, height: float, scale: float) -> list[str]:
    """The waits of a device's actions, as one path."""
    boxes = [
        f"M{number(LEFT + start * scale)} {number(y)}h{number((end - start) * scale)}"
        f"v{number(height)}H{number(LEFT + start * scale)}z"
        for span in row
        for start, end in span.waits
    ]
    return [tag("path", class_="wait", d="".join(boxes))] if boxes else []


def phases(facts: PageData) -> tuple[str, ...]:
    """The phases that occur in the drawing, in the order of execution."""
    kinds = {(s.action.phase, s.action.stage) for row in facts.timeline.spans for s in row}
    used = {letter for kind in kinds for letter, _ in pieces(facts.plan, *kind)}
    return tuple(letter for letter in NAMES if letter in used)


def _pieces(plan: Plan, span: Span) -> Iterator[tuple[str, float, float]]:
    """The parts of an action as (class, start, end), without gaps."""
    first = span.start if span.arrived is None else span.arrived
    start, length = first, span.end - first
    parts = pieces(plan, span.action.phase, span.action.stage)
    share = 0.0
    for i, (letter, own) in enumerate(parts):
        share += own
        end = span.end if i == len(parts) - 1 else first + share * length
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
        words += f", {format_seconds(span.waiting)} of it waiting" if span.waiting else ""
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
