"""Who gives the times of a traced stage's phases: a device model, or measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from autopipe.passes.cost import PhaseSeconds, phase_seconds

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
    """

    name: str
    link: Link
    seconds: Callable[[StagePhases, int], PhaseSeconds]
    copy_seconds: Callable[[int], float]
    host_seconds: Callable[[int], float] | None
    call_seconds: float = 0.0


def modeled_timers(models: Sequence[Device], *, eager: bool = True) -> tuple[StageTimer, ...]:
    """Return a timer for each stage that computes times from a device model.

    Args:
        models: one per stage.
        eager: whether each operator is called by itself; False: phases are compiled, and nothing is
            known of their calls.
    """

    def timer(model: Device) -> StageTimer:
        return StageTimer(
            model.name,
            model.link,
            lambda stage, in_flight: phase_seconds(stage, model),
            lambda nbytes: model.seconds(0, 2 * nbytes, "memory", "fp32"),
            model.host_link.seconds if model.host_link else None,
            model.call_seconds if eager else 0.0,
        )

    timers = {id(model): timer(model) for model in models}
    return tuple(timers[id(model)] for model in models)
