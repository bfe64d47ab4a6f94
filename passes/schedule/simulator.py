"""Simulate one training step of a schedule: when each action runs, and peak memory.

It predicts a plan's step before it runs, possibly for devices that are not present, and gives an
ideal to compare a measured run with. The model: every device executes its list in order, and an
action starts when its device is free and its inputs have arrived. There are no queues, no
contention and no launch overhead; published simulations of this kind are within 1-3% of
measurements on average.

Times have no fixed unit: results have the unit of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from autopipe.errors import OptionError, shown

from .actions import Scheduled, dependencies
from .build import check_size, find_kind, schedule
from .offloading import Copy, DeviceCopies, Offload
from .timeline import Span, Timeline

Times = float | Sequence[float]
"""One time (or one number of bytes) for all stages, or one for each."""

LONGEST = 1e100
"""A time whose sums are finite."""


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
    early_recompute: bool = False,
    virtual_stages: int | None = None,
    saved_bytes: Times | None = None,
    recomputed_bytes: Times = 0.0,
    weight_bytes: Times | None = None,
) -> Timeline:
    """Simulate one training step of a schedule on K devices.

    Kinds with v stages per device get the same model as the others: one value is the work of a
    device, and each of its v stages takes 1/v of it. So results of two kinds with the same
    arguments are comparable. The closed forms of the bubble are in the docstrings of `kinds`.

    Args:
        kind: a name in `KINDS`.
        stages: K >= 1, the number of devices.
        chunks: M >= 1, the number of micro-batches.
        forward: time of F: one value for all devices, or one for each of K, or, where v > 1, one
            for each of the vK stages. The other `Times` likewise.
        backward: time of B, the gradients of a stage's inputs alone.
        weight: time of W, the gradients of its parameters.
        recompute: time of R, rematerialization.
        transfer: time from the end of an action to the earliest start, on another device, of one
            that depends on it. Between stages of one device there is no transfer.
        early_recompute: R runs as an action of its own before its B, while the device would wait
            for the gradient.
        virtual_stages: v, the stages per device; None: the default of the kind.
        saved_bytes: what F saves for the backward, per micro-batch; None: peak memory is not
            computed.
        recomputed_bytes: what R adds to it.
        weight_bytes: what is still saved after B, for W; None: everything. See `peak_bytes`.

    Raises:
        OptionError: an unknown kind, a count below 1, a step with too many actions, or a time or a
            number of bytes that is negative, not finite, above `LONGEST`, or not one for each.
    """
    check_size(find_kind(kind).name, stages, chunks, virtual_stages)
    scheduled = schedule(
        kind,
        stages,
        chunks,
        early_recompute=early_recompute,
        virtual_stages=virtual_stages,
    )
    v = scheduled.stages // stages
    home = _device_of_stage(scheduled)

    def per_stage(what: str, values: Times) -> tuple[float, ...]:
        """One value for each stage, from values for stages or for devices."""
        if isinstance(values, Sequence) and len(values) == stages * v:
            return _per_stage(what, values, stages * v)
        checked = _per_stage(what, values, stages, or_count=stages * v)
        return tuple(checked[home[stage]] / v for stage in range(stages * v))

    return simulate_schedule(
        scheduled,
        forward=per_stage("forward", forward),
        backward=per_stage("backward", backward),
        weight=per_stage("weight", weight),
        recompute=per_stage("recompute", recompute),
        transfer=transfer,
        saved_bytes=None if saved_bytes is None else per_stage("saved_bytes", saved_bytes),
        recomputed_bytes=per_stage("recomputed_bytes", recomputed_bytes),
        weight_bytes=None if weight_bytes is None else per_stage("weight_bytes", weight_bytes),
    )


def simulate_schedule(
    scheduled: Scheduled,
    *,
    forward: Times,
    backward: Times = 0.0,
    weight: Times = 0.0,
    recompute: Times = 0.0,
    transfer: float = 0.0,
    saved_bytes: Times | None = None,
    recomputed_bytes: Times = 0.0,
    weight_bytes: Times | None = None,
) -> Timeline:
    """Simulate a given schedule; see `simulate` for the arguments.

    Here a sequence has one value for each stage, and a single value is that of every stage. An
    action takes as long as its phases together, and its results are sent when it ends: with RBW the
    gradient for the previous stage waits for W.

    Args:
        scheduled: a valid schedule.
        forward, backward, weight, recompute, transfer, saved_bytes, recomputed_bytes,
            weight_bytes: see `simulate`.

    Raises:
        OptionError: a time or a number of bytes that is negative, not finite, or not one for each
            stage.
        VerifyError: the schedule is not valid.
    """
    K = scheduled.stages
    seconds = {
        "F": _per_stage("forward", forward, K),
        "R": _per_stage("recompute", recompute, K),
        "B": _per_stage("backward", backward, K),
        "W": _per_stage("weight", weight, K),
    }
    (transfer,) = _per_stage("transfer", transfer, 1)
    timeline = simulate_actions(
        scheduled,
        lambda phase, stage, m: sum(seconds[letter][stage] for letter in phase),
        lambda letter, source, to, m: transfer,
    )
    if saved_bytes is None:
        return timeline
    memory = peak_bytes(scheduled, saved_bytes, recomputed_bytes, weight_bytes)
    return replace(timeline, peak_bytes=memory)


def simulate_actions(
    scheduled: Scheduled,
    duration: Callable[[str, int, int], float],
    delay: Callable[[str, int, int, int], float],
    away: Sequence[Sequence[Offload]] = (),
    copy: Copy = lambda stage, m: 0.0,
) -> Timeline:
    """As `simulate_schedule`, with times that may differ between micro-batches.

    Args:
        scheduled: a valid schedule.
        duration: time of an action, from its phase, stage and micro-batch.
        delay: time of a transfer to another device, from the letter of the phase that computes the
            value ("F" or "B"), the stage where that ran, the stage that needs it, and the
            micro-batch.
        away: for each device what is offloaded to the host; (): nothing.
        copy: time of a copy to the host, or back.

    Raises:
        VerifyError: the schedule is not valid.
    """
    order = scheduled.verified_order()
    home = _device_of_stage(scheduled)
    waits = {
        one: dependencies(*one, scheduled.stages)
        for one in {(a.phase, a.stage) for row in scheduled.devices for a in row}
    }
    ends: dict[tuple[str, int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in scheduled.devices]
    lanes = [DeviceCopies(own, copy) for own in away or [()] * len(spans)]
    for device, action in order:
        phase, own, m = action.phase, action.stage, action.microbatch
        index = len(spans[device])
        start = lanes[device].start_of(index, spans[device][-1].end if index else 0.0)
        for letter, stage in waits[phase, own]:
            ready = ends[letter, stage, m]
            if home[stage] != home[own]:
                ready += delay(letter, stage, own, m)
            start = max(start, ready)
        end = start + duration(phase, own, m)
        spans[device].append(Span(action, start, end))
        lanes[device].ended(index, end)
        for letter in phase:
            ends[letter, own, m] = end
    longest = max(row[-1].end - row[0].start for row in spans if row)
    work = max(math.fsum(span.end - span.start for span in row) for row in spans)
    return Timeline(
        makespan=max(row[-1].end for row in spans if row),
        bubble=max(0.0, 1 - work / longest) if longest else 0.0,
        spans=tuple(map(tuple, spans)),
        in_flight=scheduled.in_flight(),
        copies=tuple(tuple(lane.copies) for lane in lanes) if away else (),
    )


def peak_bytes(
    scheduled: Scheduled,
    saved_bytes: Times,
    recomputed_bytes: Times = 0.0,
    weight_bytes: Times | None = None,
) -> tuple[float, ...]:
    """For each device, the largest number of bytes that its micro-batches occupy at once.

    A micro-batch at a stage occupies nothing before F; `saved_bytes` from the start of F;
    `recomputed_bytes` more from the start of R; `weight_bytes` from the end of B; nothing from the
    end of W. While B runs, the larger of what it reads and what it leaves saved is counted. A
    device does one thing at a time, so the result follows from the order of its actions alone.

    Not counted: parameters, their gradients and optimizer state, temporaries within an action, and
    values that have arrived from other devices and are not used yet.

    Args:
        scheduled: a valid schedule; without backward actions nothing is saved and all are 0.
        saved_bytes: one value for all stages or one for each, per micro-batch.
        recomputed_bytes: likewise.
        weight_bytes: likewise; None: saved + recomputed, a safe bound: everything is saved until W.
            (In arXiv 2401.10241, Table 1, B frees the larger part.)

    Raises:
        OptionError: a number of bytes that is negative, not finite, or not one for each stage.
    """
    K = scheduled.stages
    saved = _per_stage("saved_bytes", saved_bytes, K)
    recomputed = _per_stage("recomputed_bytes", recomputed_bytes, K)
    whole = [a + b for a, b in zip(saved, recomputed, strict=True)]
    left = whole if weight_bytes is None else _per_stage("weight_bytes", weight_bytes, K)
    before = {"F": [0.0] * K, "R": saved, "B": whole, "W": left}
    after = {"F": saved, "R": whole, "B": left, "W": [0.0] * K}
    trains = any(action.phase != "F" for row in scheduled.devices for action in row)
    peaks = []
    for row in scheduled.devices:
        now = peak = 0.0
        for action in row if trains else ():
            for letter in action.phase:
                one, two = before[letter][action.stage], after[letter][action.stage]
                peak = max(peak, now, now + two - one)
                now += two - one
        peaks.append(peak)
    return tuple(peaks)


def _device_of_stage(scheduled: Scheduled) -> dict[int, int]:
    """The device of each stage."""
    return {action.stage: device for device, row in enumerate(scheduled.devices) for action in row}


def _per_stage(what: str, values: Times, count: int, *, or_count: int = 0) -> tuple[float, ...]:
    """`count` checked values; `or_count` is another length that the error names as valid."""
    given = values if isinstance(values, Sequence) else (values,) * count
    several: Sequence[Any] = () if isinstance(values, (str, bytes)) else given
    if len(several) != count:
        counts = f"{count} or {or_count}" if or_count > count else f"{count}"
        found = shown(values) if isinstance(values, (str, bytes)) else f"{len(several)} values"
        raise OptionError(f"`{what}`", expected=f"one value, or {counts}", found=found)
    return tuple(_checked(what, value) for value in several)


def _checked(what: str, value: Any) -> float:
    """A time, or a number of bytes."""
    try:
        finite = not isinstance(value, (str, bytes)) and 0 <= float(value) < math.inf
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: of a tensor
        finite = False
    if not finite:
        raise OptionError(f"`{what}`", expected="a finite value >= 0", found=shown(value))
    if value > LONGEST:
        raise OptionError(f"`{what}`", expected=f"at most {LONGEST:.0e}", found=shown(value))
    number: float = value
    return number
