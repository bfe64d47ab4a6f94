"""How long a schedule takes: its actions played out in time, on paper.

A plan has to be judged before it is run, for devices that may not be here, and a measured run has
to be judged against what was possible. Both need the same few lines: every device executes its list
in order, an action starts when its device is free and what it needs has arrived. There are no
queues, no contention and no launch overhead; published simulations of this kind are within 1-3% of
measurements on average.

Times have no unit of their own: what goes in comes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from autopipe.errors import OptionError, VerifyError
from autopipe.passes.schedule import Action, Scheduled, schedule

Times = float | Sequence[float]
"""One time for all stages, or one for each."""

_COLUMNS = 88  # of the drawing; with the label 100


@dataclass(frozen=True)
class Span:
    """When one action ran, from `start` to `end`."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a simulated step looks like.

    Attributes:
        makespan: end of the last action; the first starts at 0.
        bubble: share of the pipeline's time that is idle, 1 - work/span. Work is the most that one
            device does, for equal stages M(F + R + B + W); span the longest that one device takes
            from its first action's start to its last one's end (arXiv 2401.10241, Table 5).
        spans: per device, its actions in order.
        in_flight: per stage, the most micro-batches between forward and backward.
    """

    makespan: float
    bubble: float
    spans: tuple[tuple[Span, ...], ...]
    in_flight: tuple[int, ...]

    def verify(self, scheduled: Scheduled) -> None:
        """Check that each device does its actions in order, one at a time, after what they need.

        Raises:
            VerifyError: naming the device and the action.
        """
        ends = {
            Action(letter, span.action.stage, span.action.microbatch): span.end
            for row in self.spans
            for span in row
            for letter in span.action.phase
        }
        if tuple(tuple(span.action for span in row) for row in self.spans) != scheduled.devices:
            raise VerifyError("the timeline does not have the schedule's actions in its order")
        for device, row in enumerate(self.spans):
            for one, two in pairwise(row):
                if two.start < one.end:
                    what = f"{two.action} on device {device} overlaps {one.action}"
                    raise VerifyError(what, expected=f">= {one.end}", found=f"{two.start}")
            for span in row:
                what = f"{span.action} on device {device}"
                if not 0 <= span.start <= span.end <= self.makespan:
                    raise VerifyError(f"{what} has no place in time", found=str(span))
                for need in span.action.needs(scheduled.stages):
                    if span.start < ends[need]:
                        found = f"starts at {span.start}, {need} ends at {ends[need]}"
                        raise VerifyError(f"{what} does not wait for {need}", found=found)

    def __str__(self) -> str:
        """A Gantt chart: digits are forwards, letters the other phases (a: micro-batch 0)."""
        title = (
            f"makespan {self.makespan:.6g}, bubble {self.bubble:.4f}, "
            f"in flight {' '.join(map(str, self.in_flight))}"
        )
        rows = [f"device {device:<3}  {self._draw(row)}" for device, row in enumerate(self.spans)]
        return "\n".join([title, *rows])

    def _draw(self, row: Sequence[Span]) -> str:
        cells = ["."] * _COLUMNS
        for span in row if self.makespan else ():
            m = span.action.microbatch
            mark = str(m % 10) if span.action.phase == "F" else chr(ord("a") + m % 26)
            first, last = (round(t / self.makespan * _COLUMNS) for t in (span.start, span.end))
            cells[first:last] = mark * (last - first)
        return "".join(cells)


def simulate(
    kind: str,
    *,
    stages: int,
    chunks: int,
    forward: Times,
    backward: Times,
    weight: Times = 0.0,
    recompute: Times = 0.0,
    transfer: float = 0.0,
) -> Timeline:
    """Play one training step out in time.

    With equal stages and free transfers GPipe and 1F1B both take (M + K - 1)(F + R + B + W).

    Args:
        kind: a schedule that `schedule` knows.
        stages: K >= 1.
        chunks: M >= 1.
        forward: time of F, for all stages or for each of K.
        backward: time of B, the gradients of a stage's inputs alone.
        weight: time of W, the gradients of its parameters.
        recompute: time of R, rematerialization.
        transfer: from the end of an action to the earliest start, on another device, of one that
            needs it.

    Raises:
        OptionError: a time that is negative, not finite, or not one for each stage.
        UnsupportedError: a kind that is known and not implemented.
    """
    return play(
        schedule(kind, stages, chunks),
        forward=forward,
        backward=backward,
        weight=weight,
        recompute=recompute,
        transfer=transfer,
    )


def play(
    scheduled: Scheduled,
    *,
    forward: Times,
    backward: Times = 0.0,
    weight: Times = 0.0,
    recompute: Times = 0.0,
    transfer: float = 0.0,
) -> Timeline:
    """Play a schedule out in time; `simulate` says what the arguments mean.

    An action takes the sum of its phases, and what it makes leaves when it ends: with RBW the
    gradient for the stage before waits for W.

    Raises:
        OptionError: a time that is negative, not finite, or not one for each stage.
        VerifyError: the schedule is not sound.
    """
    scheduled.verify()
    K = scheduled.stages
    seconds = {
        "F": _per_stage("forward", forward, K),
        "R": _per_stage("recompute", recompute, K),
        "B": _per_stage("backward", backward, K),
        "W": _per_stage("weight", weight, K),
    }
    (transfer,) = _per_stage("transfer", transfer, 1)
    home = {action.stage: device for device, row in enumerate(scheduled.devices) for action in row}
    ends: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in scheduled.devices]
    for device, action in scheduled.runnable():
        start = spans[device][-1].end if spans[device] else 0.0
        for need in action.needs(K):
            start = max(start, ends[need] + (transfer if home[need.stage] != device else 0.0))
        end = start + sum(seconds[letter][action.stage] for letter in action.phase)
        spans[device].append(Span(action, start, end))
        for letter in action.phase:
            ends[Action(letter, action.stage, action.microbatch)] = end
    longest = max(row[-1].end - row[0].start for row in spans if row)
    work = max(math.fsum(span.end - span.start for span in row) for row in spans)
    return Timeline(
        makespan=max(row[-1].end for row in spans if row),
        bubble=max(0.0, 1 - work / longest) if longest else 0.0,
        spans=tuple(map(tuple, spans)),
        in_flight=scheduled.in_flight(),
    )


def _per_stage(what: str, times: Times, K: int) -> tuple[float, ...]:
    """K times, checked."""
    values = tuple(times) if isinstance(times, Sequence) else (times,) * K
    if len(values) != K:
        found = f"{len(values)} times"
        raise OptionError(f"`{what}`", expected=f"one time, or {K} times", found=found)
    for value in values:
        if not 0 <= value < math.inf:
            raise OptionError(f"`{what}`", expected="a finite time >= 0", found=str(value))
    return values
