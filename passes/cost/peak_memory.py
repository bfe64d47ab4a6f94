"""The most that the micro-batches of a step occupy at each stage.

While F runs a micro-batch takes what F takes, then what F keeps; while its backward runs what that
takes; then nothing. What other stages send is there from when they have sent it until the stage
comes to it: how early they are is not known, only how early they can be, so as much is counted as
the runtime lets wait. What the caller gives is the caller's until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from autopipe.passes.ir import CALLER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autopipe.passes.ir import Route
    from autopipe.passes.schedule import Span, Timeline

    from .phase_memory import StageBytes


class _Waiting(NamedTuple):
    """One kind of message: of F or of its backward, bytes, how many may wait; and from when on."""

    forward: bool
    nbytes: int
    room: int
    first: float


def stage_peak_bytes(
    line: Timeline,
    stages: int,
    sizes: Sequence[int],
    nbytes: Mapping[tuple[int, int], StageBytes],
    routes: Mapping[str, Route],
    room: Callable[[int, int], int],
) -> tuple[int, ...]:
    """The most bytes at once, per stage.

    Args:
        line: a simulated step whose backward is one action a micro-batch and stage. Only the order
            of the actions matters, and whether gradients come while there is still forward to do.
        stages: K.
        sizes: samples of each micro-batch.
        nbytes: by stage and size.
        routes: of the values between stages.
        room: (from, to) → how many messages of one kind the runtime lets wait.
    """
    actions: list[list[Span]] = [[] for _ in range(stages)]
    for row in line.spans:
        for span in row:
            actions[span.action.stage].append(span)
    first = [
        min((s.end for s in own if s.action.phase != "F"), default=float("inf")) for own in actions
    ]
    ordered = sorted(routes.values(), key=lambda route: route.source)
    activations = [route for route in ordered if route.kind == "activation"]
    return tuple(
        _peak(
            actions[k],
            sizes,
            {size: nbytes[k, size] for size in set(sizes)},
            _waiting(k, nbytes[k, max(sizes)], routes, activations, room, first),
        )
        for k in range(stages)
    )


def _waiting(
    k: int,
    nbytes: StageBytes,
    routes: Mapping[str, Route],
    activations: Sequence[Route],
    room: Callable[[int, int], int],
    first: Sequence[float],
) -> list[_Waiting]:
    """What other stages send to stage k.

    `activations`: routes in the order of their sources; `first`: when each stage has made its
    first gradients.
    """
    found = []
    after = {k}  # what cannot begin its backward before k has done its part of the forward
    for route in activations:
        if route.source in after:
            after.update(route.consumers)
    for name, size in nbytes.received.items():
        if (source := routes[name].source) != CALLER:
            found.append(_Waiting(True, size, room(source, k), 0.0))
    for name, size in nbytes.tangents.items():
        if (later := routes[name].gradient_from(k)) is not None:
            earliest = first[later] if later in after else 0.0
            found.append(_Waiting(False, size, room(later, k), earliest))
    return found


def _peak(
    actions: Sequence[Span],
    sizes: Sequence[int],
    nbytes: Mapping[int, StageBytes],
    waiting: Sequence[_Waiting],
) -> int:
    peak = saved = 0
    left = {True: len(sizes), False: len(sizes)}
    for span in actions:
        forward = span.action.phase == "F"
        own = nbytes[sizes[span.action.microbatch]]
        left[forward] -= 1
        if forward:
            now = own.forward
        else:
            saved -= own.saved
            now = own.first_backward if left[False] == len(sizes) - 1 else own.backward
        pending = sum(
            kind.nbytes * min(kind.room, left[kind.forward])
            for kind in waiting
            if kind.forward or not forward or kind.first < span.end
        )
        peak = max(peak, pending + saved + now)
        if forward:
            saved += own.saved
    return peak
