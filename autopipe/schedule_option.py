"""Read the options `schedule` and `virtual_stages`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopipe.errors import OptionError, VerifyError, shown
from autopipe.passes.schedule import (
    DEFAULT_KIND,
    KINDS,
    Scheduled,
    schedule_for,
    schedule_of_function,
    schedule_of_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from autopipe.passes.schedule import DeviceSchedule

MOST_STAGES = 1024
"""As in a plan's file."""


def parse_schedule(
    schedule: Any, virtual_stages: int | None, devices: int, chunks: int | None
) -> DeviceSchedule | None:
    """Read a schedule.

    Args:
        schedule: the name of a kind, "auto", a function of K and M, a `Scheduled`, or None for the
            default kind.
        virtual_stages: stages per device; None: the default of the kind.
        devices: K.
        chunks: the number of micro-batches, if it is known.

    Returns:
        The schedule for K devices; None if the planner chooses it.

    Raises:
        OptionError: it is none of these, or is not for that many devices, stages per device, or
            micro-batches.
    """
    if isinstance(schedule, Scheduled) or callable(schedule):
        return _own(schedule, virtual_stages, devices, chunks)
    if isinstance(schedule, str) and schedule == "auto":
        if virtual_stages is not None:
            raise OptionError(
                "the planner chooses the number of stages per device too",
                expected="the name of a schedule beside virtual_stages",
                found=f'schedule="auto", virtual_stages={shown(virtual_stages)}',
            )
        return None
    name = DEFAULT_KIND if schedule is None else schedule
    if not isinstance(name, str) or name not in KINDS:
        known = ", ".join((*KINDS, "auto"))
        raise OptionError("unknown schedule", expected=f"one of {known}", found=shown(schedule))
    if isinstance(virtual_stages, int) and virtual_stages * devices > MOST_STAGES:
        raise OptionError(
            "too many stages",
            expected=f"at most {MOST_STAGES:,}: devices times virtual_stages",
            found=f"{devices} devices, virtual_stages={shown(virtual_stages)}",
        )
    return schedule_for(name, devices, virtual_stages)


def _own(
    schedule: Scheduled | Callable[[int, int], Any],
    virtual_stages: int | None,
    devices: int,
    chunks: int | None,
) -> DeviceSchedule:
    """A user's own schedule, which says itself where stages are."""
    if virtual_stages is not None:
        raise OptionError(
            "a schedule of your own says itself which stages a device has",
            expected="virtual_stages left out",
            found=f"virtual_stages={shown(virtual_stages)}",
        )
    if not isinstance(schedule, Scheduled):
        own = schedule_of_function(schedule, devices, chunks)
        _check_backwards(own, own.scheduled(chunks or devices))
        return own
    try:
        schedule.verify()
    except VerifyError as error:
        raise OptionError(error.problem, expected=error.expected, found=error.found) from error
    own = schedule_of_rows(schedule)
    _check_backwards(own, schedule)
    if own.devices != devices:
        raise OptionError(
            f"schedule {own.name!r} is for another number of devices",
            expected=f"devices={own.devices}",
            found=f"{devices} devices",
        )
    own.scheduled(chunks or 1)  # which checks that it is for so many
    return own


def _check_backwards(own: DeviceSchedule, scheduled: Scheduled) -> None:
    """Refuse a schedule for inference: a pipeline trains, too, and leaves backwards out itself."""
    if all(action.phase == "F" for row in scheduled.devices for action in row):
        raise OptionError(
            f"schedule {own.name!r} has forwards alone",
            expected="for each stage and micro-batch F, B and W",
            remedy="list the backwards, too; where no gradient is needed, they do not run",
        )
