"""The most that the micro-batches of a step occupy at each stage, along a simulated timeline.

What a stage receives is there from the moment its maker has made it, and waits until the stage
comes to it; while F runs a micro-batch takes what F takes, then what F keeps; while its backward
runs what that takes; then nothing. So a stage that is slower than its neighbour, or further from
the maker of a gradient, has more waiting. What the caller gives is the caller's until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .staged import CALLER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .memory import StageBytes
    from .staged import Route
    from .timeline import Span, Timeline


def stage_peaks(
    line: Timeline,
    stages: int,
    sizes: Sequence[int],
    nbytes: Mapping[tuple[int, int], StageBytes],
    routes: Mapping[str, Route],
) -> tuple[int, ...]:
    """The most bytes at once, per stage.

    Args:
        line: a simulated step whose backward is one action a micro-batch and stage.
        stages: K.
        sizes: samples of each micro-batch.
        nbytes: by stage and size.
        routes: of the values between stages.
    """
    ends: dict[tuple[bool, int], dict[int, float]] = {}
    actions: list[list[Span]] = [[] for _ in range(stages)]
    for row in line.spans:
        for span in row:
            forward, k = span.action.phase == "F", span.action.stage
            ends.setdefault((forward, k), {})[span.action.microbatch] = span.end
            actions[k].append(span)
    return tuple(
        _peak(k, actions[k], ends, sizes, {s: nbytes[k, s] for s in set(sizes)}, routes)
        for k in range(stages)
    )


def _peak(
    k: int,
    actions: Sequence[Span],
    ends: Mapping[tuple[bool, int], Mapping[int, float]],
    sizes: Sequence[int],
    nbytes: Mapping[int, StageBytes],
    routes: Mapping[str, Route],
) -> int:
    """Of one stage. Changes of what waits and of what is saved, in the order of time."""
    changes: list[tuple[float, int]] = []
    for forward, what in ((True, "received"), (False, "tangents")):
        starts = {
            s.action.microbatch: s.start for s in actions if (s.action.phase == "F") == forward
        }
        for name in getattr(next(iter(nbytes.values())), what):
            source = _source(routes[name], k, forward=forward)
            if source is None:
                continue
            for m, at in ends.get((forward, source), {}).items():
                size = getattr(nbytes[sizes[m]], what)[name]
                changes += [(at, size), (max(at, starts.get(m, at)), -size)]
    # What is saved begins to count when F ends, and is a part of the backward when that starts.
    for span in actions:
        saved = nbytes[sizes[span.action.microbatch]].saved
        changes.append((span.end, saved) if span.action.phase == "F" else (span.start, -saved))
    changes.sort(key=lambda change: change[0])
    peak = now = at = 0
    for span in actions:
        of = nbytes[sizes[span.action.microbatch]]
        own = of.forward if span.action.phase == "F" else of.backward
        while at < len(changes) and changes[at][0] <= span.start:
            now += changes[at][1]
            at += 1
        peak = max(peak, now + own)
        while at < len(changes) and changes[at][0] < span.end:
            now += changes[at][1]
            at += 1
            peak = max(peak, now + own)
    return peak


def _source(route: Route, k: int, *, forward: bool) -> int | None:
    """The stage that sends stage k a value, or its gradient; None: the caller does."""
    if forward:
        return None if route.source == CALLER else route.source
    return route.gradient_from(k)
