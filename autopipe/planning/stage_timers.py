"""Who gives the times of a traced stage's phases: a device model, or measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from autopipe.passes.cost import PhaseSeconds, operator_calls, phase_seconds, replayed_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autopipe.passes.devices import Device, Link
    from autopipe.passes.ir import StagePhases


class StageTimer(NamedTuple):
    """Gives the times of a traced stage's phases: by a device model, or measured.

    Attributes:
        name: of the device model, or "measured on" a device.
        link: the link over which the stage receives.
        seconds: returns the seconds of a stage's phases for one micro-batch, given the number of
            micro-batches in flight.
        copy_seconds: returns the seconds that copying a number of bytes takes.
        host_seconds: returns the seconds that copying a number of bytes to the host takes, or back;
            None: the device's memory is the host's.
        call_seconds: in which the host's process issues an operator call of the stage; 0 where
            times contain it, or nothing is known of it.
        calls: returns how many calls a micro-batch makes at a stage.
    """

    name: str
    link: Link
    seconds: Callable[[StagePhases, int], PhaseSeconds]
    copy_seconds: Callable[[int], float]
    host_seconds: Callable[[int], float] | None
    call_seconds: float = 0.0
    calls: Callable[[StagePhases], int] = operator_calls


def modeled_timers(models: Sequence[Device], backend: str = "eager") -> tuple[StageTimer, ...]:
    """Return a timer for each stage that computes times from a device model.

    Args:
        models: one per stage.
        backend: what runs the phases; nothing is known of the calls of "inductor".
    """

    def timer(model: Device) -> StageTimer:
        return StageTimer(
            model.name,
            model.link,
            lambda stage, in_flight: phase_seconds(stage, model),
            lambda nbytes: model.seconds(0, 2 * nbytes, "memory", "fp32"),
            model.host_link.seconds if model.host_link else None,
            0.0 if backend == "inductor" else model.call_seconds,
            replayed_calls if backend == "cudagraphs" else operator_calls,
        )

    timers = {id(model): timer(model) for model in models}
    return tuple(timers[id(model)] for model in models)
