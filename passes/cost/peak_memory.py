"""Compute the peak bytes that the micro-batches of one training step occupy at each stage.

While F runs, a micro-batch occupies what F needs; after it, what F saved; while its backward runs,
what that needs; then nothing, or, if W runs later, what is kept for it. If R runs as an action of
its own, its results are kept for B. A message from another stage occupies memory from the time when
it is sent until the stage uses it. Only the earliest arrival of a message is known, so the
runtime's queues are counted as full. The caller's inputs count as the caller's memory until they
are used. Where several stages have a part of a parameter's gradient, the parts are added at its
owner after the last action, when nothing is saved any more. What is offloaded does not count from
when its memory is free until memory for it is allocated again.
"""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from autopipe.passes.ir import CALLER
from autopipe.passes.schedule import Action, Move, Span, called_moves, memory_moves

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from autopipe.passes.ir import Route
    from autopipe.passes.schedule import Offload, Scheduled, Timeline

    from .phase_memory import StageBytes


StepT = TypeVar("StepT", Action, Span)


class PeakBytes(NamedTuple):
    """Peaks of one step.

    Attributes:
        stages: of each stage by itself.
        devices: of each device, for all of its stages at the same time.
    """

    stages: tuple[int, ...]
    devices: tuple[int, ...]


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


def peak_bytes(
    line: Timeline,
    stages: int,
    sizes: Sequence[int],
    nbytes: Mapping[tuple[int, int], StageBytes],
    routes: Mapping[str, Route],
    capacity: Callable[[int, int], int],
    away: Sequence[Sequence[Offload]] = (),
) -> PeakBytes:
    """Return the peak bytes of each stage and of each device.

    Args:
        line: a simulated step. Only the order of the actions matters, and whether gradients arrive
            while the stage still has forwards to run.
        stages: their number.
        sizes: samples of each micro-batch.
        nbytes: by stage and micro-batch size.
        routes: of the values between stages.
        capacity: (from, to) → how many messages of one kind the runtime queues.
        away: for each device what is offloaded to the host; (): nothing.
    """
    devices = []
    for device, row in enumerate(line.spans):
        starts = [span.start for span in row]
        moves = memory_moves(away[device], starts, line.copies[device]) if away else ()
        devices.append(_with_moves(row, moves))
    actions = [_of_stage(devices, k) for k in range(stages)]
    first = [
        min((s.end for s in own if isinstance(s, Span) and "B" in s.action.phase), default=inf)
        for own in actions
    ]
    ordered = sorted(routes.values(), key=lambda route: route.source)
    activations = [route for route in ordered if route.kind == "activation"]
    waiting = [
        _waiting(k, nbytes[k, max(sizes)], routes, activations, capacity, first)
        for k in range(stages)
    ]
    of_micro_batch = {
        (k, m): nbytes[k, size] for k in range(stages) for m, size in enumerate(sizes)
    }
    chunks = len(sizes)
    sums = [nbytes[k, max(sizes)].sums for k in range(stages)]
    return PeakBytes(
        tuple(
            max(_peak(own, chunks, of_micro_batch, waiting), _adding({k}, sums, routes, chunks))
            for k, own in enumerate(actions)
        ),
        tuple(
            max(
                _peak(own, chunks, of_micro_batch, waiting),
                _adding({span.action.stage for span in row}, sums, routes, chunks),
            )
            for own, row in zip(devices, line.spans, strict=True)
        ),
    )


def _adding(
    stages: Collection[int],
    sums: Sequence[Mapping[str, int]],
    routes: Mapping[str, Route],
    chunks: int,
) -> int:
    """The peak at some stages while parts of gradients are added, one parameter after another.

    A part of another stage's arrives, and with a single micro-batch the total is a new tensor: its
    gradient is not added to in place.
    """
    more = [
        sums[k][r.name] * ((k not in stages) + (chunks == 1))
        for r in routes.values()
        if r.kind == "parameter" and r.source in stages
        for k in r.consumers
        if r.name in sums[k]
    ]
    return sum(sum(sums[k].values()) for k in stages) + max(more) if more else 0


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


def _with_moves(row: Sequence[StepT], moves: Sequence[Move]) -> list[StepT | Move]:
    """A device's actions with the moves between them."""
    found: list[StepT | Move] = []
    rest = [*moves]
    for i, one in enumerate(row):
        while rest and rest[0].before <= i:
            found.append(rest.pop(0))
        found.append(one)
    return found


def _stage_of(step: Span | Action | Move) -> int:
    return step.action.stage if isinstance(step, Span) else step.stage


def _of_stage(rows: Sequence[Sequence[StepT | Move]], k: int) -> list[StepT | Move]:
    """The actions and moves of one stage."""
    return [step for row in rows for step in row if _stage_of(step) == k]


def _peak(
    actions: Sequence[Span | Move],
    chunks: int,
    nbytes: Mapping[tuple[int, int], StageBytes],
    waiting: Sequence[Sequence[_Waiting]],
) -> int:
    """The peak while actions run, of one stage or of all stages of a device."""
    stages = sorted({_stage_of(step) for step in actions})
    held = _Held(nbytes)
    peak = 0
    left = {(k, forward): chunks for k in stages for forward in (True, False)}
    for span in actions:
        if isinstance(span, Move):
            held.move(span)
            continue
        k, phase = span.action.stage, span.action.phase
        if phase == "F" or "B" in phase:
            left[k, phase == "F"] -= 1
        first = "B" in phase and left[k, False] == chunks - 1
        running = held.while_running(span.action, first=first)
        pending = sum(
            kind.nbytes * min(kind.capacity, left[stage, kind.forward])
            for stage in stages
            for kind in waiting[stage]
            if kind.forward or phase != "F" or kind.earliest < span.end
        )
        peak = max(peak, pending + running)
    return peak


def peak_saved_bytes(
    scheduled: Scheduled,
    nbytes: Mapping[tuple[int, int], StageBytes],
    away: Sequence[Sequence[Offload]] = (),
) -> PeakBytes:
    """Return the most bytes that micro-batches save at once between their phases.

    What is offloaded counts until its copy to the host begins, and again from when the copy back
    does.

    Args:
        scheduled: what each device runs.
        nbytes: by stage and micro-batch.
        away: for each device what is offloaded; (): nothing.
    """
    rows = [
        _with_moves(row, called_moves(away[device]) if away else ())
        for device, row in enumerate(scheduled.devices)
    ]
    return PeakBytes(
        tuple(_peak_saved(_of_stage(rows, k), nbytes) for k in range(scheduled.stages)),
        tuple(_peak_saved(row, nbytes) for row in rows),
    )


def _peak_saved(
    steps: Sequence[Action | Move], nbytes: Mapping[tuple[int, int], StageBytes]
) -> int:
    """The most bytes that are saved at once, of one stage or of all stages of a device."""
    held = _Held(nbytes)
    peak = 0
    for step in steps:
        if isinstance(step, Move):
            held.move(step)
        else:
            held.while_running(step, first=False)
        peak = max(peak, held.total)
    return peak


class _Held:
    """What is saved between the phases of micro-batches; all actions are told to it in order."""

    def __init__(self, nbytes: Mapping[tuple[int, int], StageBytes]) -> None:
        self.total = 0
        self._nbytes = nbytes
        self._of: Counter[tuple[int, int]] = Counter()

    def move(self, move: Move) -> None:
        """Something leaves the device, or returns."""
        at = move.stage, move.microbatch
        change = self._nbytes[at].offloaded * (-1 if move.leaves else 1)
        self._of[at] += change
        self.total += change

    def while_running(self, action: Action, *, first: bool) -> int:
        """Return the peak bytes while an action runs; `total` is then what is saved after it.

        `first` tells the first backward of a stage.
        """
        at = action.stage, action.microbatch
        own, phase = self._nbytes[at], action.phase
        if phase == "F":
            running, after = own.forward, own.saved
        elif phase == "R":
            running, after = own.recompute, own.recomputed
        elif phase == "W":
            running, after = own.weights, 0
        elif "W" not in phase:
            running, after = own.gradients, own.kept
        else:
            running, after = own.first_backward if first else own.backward, 0
        self.total -= self._of[at]
        peak = self.total + running
        self._of[at] = after
        self.total += after
        return peak
