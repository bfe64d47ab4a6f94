"""Compute the peak bytes that the micro-batches of one training step occupy at each stage.

While F runs, a micro-batch occupies what F needs; after it, what F saved; while its backward runs,
what that needs; then nothing, or, if W runs later, what is kept for it. A message from another
stage occupies memory from the time when it is sent until the stage uses it. Only the earliest
arrival of a message is known, so the runtime's queues are counted as full. The caller's inputs
count as the caller's memory until they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from autopipe.passes.ir import CALLER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from autopipe.passes.ir import Route
    from autopipe.passes.schedule import Action, Span, Timeline

    from .phase_memory import StageBytes


class _Waiting(NamedTuple):
    """Messages of one kind that are queued at a stage.

    forward: True if F uses them, False if the backward does.
    nbytes: of one message.
    capacity: how many may be queued.
    earliest: seconds from the start of the step; none arrives before.
    """

    forward: bool
    nbytes: int
    capacity: int
    earliest: float


def stage_peak_bytes(
    line: Timeline,
    stages: int,
    sizes: Sequence[int],
    nbytes: Mapping[tuple[int, int], StageBytes],
    routes: Mapping[str, Route],
    capacity: Callable[[int, int], int],
) -> tuple[int, ...]:
    """Return the peak bytes of each stage.

    Args:
        line: a simulated step in which each micro-batch's backward at a stage is one action, or
            two: RB and W. Only the order of the actions matters, and whether gradients arrive while
            the stage still has forwards to run.
        stages: K.
        sizes: samples of each micro-batch.
        nbytes: by stage and micro-batch size.
        routes: of the values between stages.
        capacity: (from, to) → how many messages of one kind the runtime queues.

    Returns:
        K sizes in bytes.
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
            _waiting(k, nbytes[k, max(sizes)], routes, activations, capacity, first),
        )
        for k in range(stages)
    )


def _waiting(
    k: int,
    nbytes: StageBytes,
    routes: Mapping[str, Route],
    activations: Sequence[Route],
    capacity: Callable[[int, int], int],
    first: Sequence[float],
) -> list[_Waiting]:
    """The messages that other stages send to stage k.

    `activations` are routes in the order of their sources; `first` says when each stage finishes
    its first backward.
    """
    found = []
    after = {k}  # stages whose backward cannot begin before k has finished its forward
    for route in activations:
        if route.source in after:
            after.update(route.consumers)
    for name, size in nbytes.received.items():
        if (source := routes[name].source) != CALLER:
            found.append(_Waiting(True, size, capacity(source, k), 0.0))
    for name, size in nbytes.tangents.items():
        if (later := routes[name].gradient_from(k)) is not None:
            earliest = first[later] if later in after else 0.0
            found.append(_Waiting(False, size, capacity(later, k), earliest))
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
        phase = span.action.phase
        forward = phase == "F"
        own = nbytes[sizes[span.action.microbatch]]
        if forward or "B" in phase:
            left[forward] -= 1
        if forward:
            now, before, after = own.forward, 0, own.saved
        elif phase == "W":
            now, before, after = own.weights, own.kept, 0
        elif "W" not in phase:
            now, before, after = own.gradients, own.saved, own.kept
        else:
            now, before, after = own.backward, own.saved, 0
            if left[False] == len(sizes) - 1:
                now = own.first_backward
        saved -= before
        pending = sum(
            kind.nbytes * min(kind.capacity, left[kind.forward])
            for kind in waiting
            if kind.forward or not forward or kind.earliest < span.end
        )
        peak = max(peak, pending + saved + now)
        saved += after
    return peak


def peak_saved_bytes(actions: Iterable[Action], nbytes: Sequence[StageBytes]) -> int:
    """Return the most bytes that a stage's micro-batches save at once between their phases.

    Args:
        actions: of the stage, in order.
        nbytes: for each micro-batch.
    """
    now = peak = 0
    for action in actions:
        own, phase = nbytes[action.microbatch], action.phase
        if phase == "F":
            now += own.saved
        elif "B" in phase:
            now += (0 if "W" in phase else own.kept) - own.saved
        elif phase == "W":
            now -= own.kept
        peak = max(peak, now)
    return peak
