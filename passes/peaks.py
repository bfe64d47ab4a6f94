"""The most that the micro-batches of a step occupy at each stage, along a simulated timeline.

What a stage receives is there from the moment its maker has made it, and waits until the stage
comes to it; while F runs a micro-batch takes what F takes, then what F keeps; while its backward
runs what that takes; then nothing. So a stage that is slower than its neighbour, or further from
the maker of a gradient, has more waiting. What the caller gives is the caller's until it is used.

Real stages are not as punctual: of each value one more than simulated is taken to wait, but no more
than the runtime lets wait (`runtime.mailbox`: K, and one that is copied and not let in). Of the
gradients of a shared parameter, which are large and come from far, so many are always counted.
"""

from __future__ import annotations

from bisect import bisect_left
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
        _peak(k, actions[k], ends, sizes, {s: nbytes[k, s] for s in set(sizes)}, routes, stages + 1)
        for k in range(stages)
    )


def _peak(
    k: int,
    actions: Sequence[Span],
    ends: Mapping[tuple[bool, int], Mapping[int, float]],
    sizes: Sequence[int],
    nbytes: Mapping[int, StageBytes],
    routes: Mapping[str, Route],
    most: int,
) -> int:
    """Of one stage; `most` of a kind may wait."""
    largest = nbytes[max(nbytes)]
    waiting = [
        (
            forward,
            nbyte,
            sorted(ends.get((forward, source), {}).values()),
            routes[name].kind == "parameter",
        )
        for forward, values in ((True, largest.received), (False, largest.tangents))
        for name, nbyte in values.items()
        if (source := _source(routes[name], k, forward=forward)) is not None
    ]
    peak = saved = 0
    begun = {True: 0, False: 0}
    for span in actions:
        forward = span.action.phase == "F"
        own = nbytes[sizes[span.action.microbatch]]
        begun[forward] += 1
        if not forward:
            saved -= own.saved
        pending = 0
        for way, nbyte, arrivals, shared in waiting:
            there = bisect_left(arrivals, span.end) - begun[way]
            some = most if shared and there > 0 else there + 1
            pending += nbyte * max(0, min(some, most, len(arrivals) - begun[way]))
        backward = own.first_backward if begun[False] == 1 else own.backward
        peak = max(peak, pending + saved + (own.forward if forward else backward))
        if forward:
            saved += own.saved
    return peak


def _source(route: Route, k: int, *, forward: bool) -> int | None:
    """The stage that sends stage k a value, or its gradient; None: the caller does."""
    if forward:
        return None if route.source == CALLER else route.source
    return route.gradient_from(k)
