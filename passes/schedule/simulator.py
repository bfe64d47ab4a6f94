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
from collections.abc import Callable, Sequence
from dataclasses import replace

from autopipe.errors import OptionError

from .actions import Scheduled, waits_for
from .kinds import schedule, stages_per_device
from .timeline import Span, Timeline

__all__ = ["Span", "Timeline", "Times", "peak_bytes", "play", "play_out", "simulate"]

Times = float | Sequence[float]
"""One time (or one count of bytes) for all stages, or one for each."""


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
    remade_bytes: Times = 0.0,
    weight_bytes: Times | None = None,
) -> Timeline:
    """Play one training step of a schedule out in time, on K devices.

    Kinds that put v stages on a device ("interleaved", "zb-v") are given the same model: one value
    is what a device has to do, as for the other kinds, and each of its v stages takes a v-th of it.
    So the results of two kinds called alike compare.

    With free transfers, equal stages, and T = F + R + B + W, the bubble (idle time in the longest
    device's span) is

    - (K - 1)T with "gpipe" and "1f1b"; (K - 1)T/v with "interleaved" if M is a multiple of K;
    - with "gpipe" and `early_recompute`, what is left of a makespan of (M + K - 1)F + M(R + B + W)
      + (K - 1)(B + W);

    and without R

    - (K - 1)(F + B - W) with "zb-h1" if W <= F and M >= K;
    - (K - 1)(F + B - 2W) with "zb-h2" if W <= min(F, B) and M >= 2K - 1;
    - 0 with "zb-v" if F = B = W and M >= 2K - 1;
    - if M <= K and W <= min(F, B), with "zb-h1" and "zb-h2" what is left of a makespan of
      (M + K - 1)(F + B) + W, and with "zb-v" at most that (1F1B: (M + K - 1)(F + B + W)).

    Args:
        kind: a schedule that `schedule` knows.
        stages: K >= 1, one per device (v per device for "interleaved" and "zb-v").
        chunks: M >= 1.
        forward: time of F: one for all devices, or one for each of K, or, where v > 1, one for each
            of the vK stages. So too every other argument that may be a sequence.
        backward: time of B, the gradients of a stage's inputs alone.
        weight: time of W, the gradients of its parameters.
        recompute: time of R, rematerialization.
        transfer: from the end of an action to the earliest start, on another device, of one that
            needs it. Between stages of one device nothing is transferred.
        early_recompute: R runs before its B as an action of its own, and so while the device would
            wait for the gradient.
        virtual_stages: v, the stages per device; see `schedule`.
        saved_bytes: what F leaves for the backward, per micro-batch; None leaves memory out.
        remade_bytes: what R adds to it.
        weight_bytes: what B leaves of it for W; None for all. See `peak_bytes`.

    Raises:
        OptionError: an unknown kind, a count that is no count, a time or a number of bytes that is
            negative, not finite, or not one for each.
    """
    scheduled = schedule(
        kind,
        stages,
        chunks,
        early_recompute=early_recompute,
        virtual_stages=virtual_stages,
    )
    v = stages_per_device(kind, virtual_stages)
    home = _home(scheduled)

    def per_stage(what: str, values: Times) -> tuple[float, ...]:
        """Values of the stages, from those of devices if that is what was given."""
        if isinstance(values, Sequence) and len(values) == stages * v:
            return _per_stage(what, values, stages * v)
        checked = _per_stage(what, values, stages, or_count=stages * v)
        return tuple(checked[home[stage]] / v for stage in range(stages * v))

    return play(
        scheduled,
        forward=per_stage("forward", forward),
        backward=per_stage("backward", backward),
        weight=per_stage("weight", weight),
        recompute=per_stage("recompute", recompute),
        transfer=transfer,
        saved_bytes=None if saved_bytes is None else per_stage("saved_bytes", saved_bytes),
        remade_bytes=per_stage("remade_bytes", remade_bytes),
        weight_bytes=None if weight_bytes is None else per_stage("weight_bytes", weight_bytes),
    )


def play(
    scheduled: Scheduled,
    *,
    forward: Times,
    backward: Times = 0.0,
    weight: Times = 0.0,
    recompute: Times = 0.0,
    transfer: float = 0.0,
    saved_bytes: Times | None = None,
    remade_bytes: Times = 0.0,
    weight_bytes: Times | None = None,
) -> Timeline:
    """Play a schedule out in time; `simulate` says what the arguments mean.

    Here a sequence has one value for each stage, and one value is that of every stage. An action
    takes the sum of its phases, and what it makes leaves when it ends: with RBW the gradient for
    the stage before waits for W.

    Raises:
        OptionError: a time or a number of bytes that is negative, not finite, or not one for each
            stage.
        VerifyError: the schedule is not sound.
    """
    K = scheduled.stages
    seconds = {
        "F": _per_stage("forward", forward, K),
        "R": _per_stage("recompute", recompute, K),
        "B": _per_stage("backward", backward, K),
        "W": _per_stage("weight", weight, K),
    }
    (transfer,) = _per_stage("transfer", transfer, 1)
    line = play_out(
        scheduled,
        lambda phase, stage, m: sum(seconds[letter][stage] for letter in phase),
        lambda letter, source, to, m: transfer,
    )
    if saved_bytes is None:
        return line
    memory = peak_bytes(scheduled, saved_bytes, remade_bytes, weight_bytes)
    return replace(line, peak_bytes=memory)


def play_out(
    scheduled: Scheduled,
    takes: Callable[[str, int, int], float],
    delay: Callable[[str, int, int, int], float],
) -> Timeline:
    """As `play`, where every micro-batch may take its own time.

    Args:
        scheduled: a sound schedule.
        takes: time of an action, by its phase, stage and micro-batch.
        delay: of what another device needs: by the letter of the phase that makes it ("F" or "B"),
            the stage where that ran, the one that needs it, and the micro-batch.

    Raises:
        VerifyError: the schedule is not sound.
    """
    order = scheduled.in_order()
    home = _home(scheduled)
    waits = {
        one: waits_for(*one, scheduled.stages)
        for one in {(a.phase, a.stage) for row in scheduled.devices for a in row}
    }
    ends: dict[tuple[str, int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in scheduled.devices]
    for device, action in order:
        phase, own, m = action.phase, action.stage, action.microbatch
        start = spans[device][-1].end if spans[device] else 0.0
        for letter, stage in waits[phase, own]:
            ready = ends[letter, stage, m]
            if home[stage] != home[own]:
                ready += delay(letter, stage, own, m)
            start = max(start, ready)
        end = start + takes(phase, own, m)
        spans[device].append(Span(action, start, end))
        for letter in phase:
            ends[letter, own, m] = end
    longest = max(row[-1].end - row[0].start for row in spans if row)
    work = max(math.fsum(span.end - span.start for span in row) for row in spans)
    return Timeline(
        makespan=max(row[-1].end for row in spans if row),
        bubble=max(0.0, 1 - work / longest) if longest else 0.0,
        spans=tuple(map(tuple, spans)),
        in_flight=scheduled.in_flight(),
    )


def peak_bytes(
    scheduled: Scheduled,
    saved_bytes: Times,
    remade_bytes: Times = 0.0,
    weight_bytes: Times | None = None,
) -> tuple[float, ...]:
    """Per device, the most bytes that its micro-batches occupy at once.

    A micro-batch at a stage occupies nothing before F; `saved_bytes` from the start of F;
    `remade_bytes` more from the start of R; `weight_bytes` from the end of B; nothing from the end
    of W. While B runs, the larger of what it reads and what it leaves is counted. A
    device does one thing at a time, so this follows from the order of its actions and no times.

    Not counted: parameters, their gradients and the optimizer's state, values within an action,
    and what has arrived from other devices and is not used yet.

    Args:
        scheduled: a sound schedule; without backward actions nothing is kept and all are 0.
        saved_bytes: one value for all stages or one for each, per micro-batch.
        remade_bytes: likewise.
        weight_bytes: likewise; None for saved + remade, the safe bound: all is kept until W. (In
            arXiv 2401.10241, Table 1, B frees the larger part.)

    Raises:
        OptionError: a number of bytes that is negative, not finite, or not one for each stage.
    """
    K = scheduled.stages
    saved = _per_stage("saved_bytes", saved_bytes, K)
    remade = _per_stage("remade_bytes", remade_bytes, K)
    whole = [a + b for a, b in zip(saved, remade, strict=True)]
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


def _home(scheduled: Scheduled) -> dict[int, int]:
    """The device of each stage."""
    return {action.stage: device for device, row in enumerate(scheduled.devices) for action in row}


def _per_stage(what: str, values: Times, count: int, *, or_count: int = 0) -> tuple[float, ...]:
    """That many values, checked; `or_count` is another length that would have been right."""
    checked = tuple(values) if isinstance(values, Sequence) else (values,) * count
    if len(checked) != count:
        counts = f"{count} or {or_count}" if or_count > count else f"{count}"
        found = f"{len(checked)} values"
        raise OptionError(f"`{what}`", expected=f"one value, or {counts}", found=found)
    for value in checked:
        if not 0 <= value < math.inf:
            raise OptionError(f"`{what}`", expected="a finite value >= 0", found=str(value))
    return checked
