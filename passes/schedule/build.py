"""Build the `Scheduled` of a kind, K devices and M micro-batches, from what a user wrote."""

from __future__ import annotations

from autopipe.errors import OptionError, shown

from .actions import Scheduled
from .device_schedule import DeviceSchedule
from .kinds import KINDS
from .schedule_kind import ScheduleKind

MOST_ACTIONS, MOST_TURNS = 2**18, 2**20
"""Stages times micro-batches, which take seconds; and stages times devices: some kinds are
generated for as many micro-batches as there are devices, or more."""


def schedule(
    kind: str,
    stages: int,
    chunks: int,
    *,
    backward: bool = True,
    early_recompute: bool = False,
    virtual_stages: int | None = None,
) -> Scheduled:
    """List what each of K devices runs in one training step.

    Stage k is on device k. Kinds with v stages per device cut the model into vK stages instead, and
    their order says on which device each stage is.

    Args:
        kind: a name in `KINDS`, which describes each kind.
        stages: K >= 1, the number of devices.
        chunks: M >= 1, the number of micro-batches.
        backward: False lists the forward actions only (inference).
        early_recompute: run R as an action of its own before each B, not as a part of it.
        virtual_stages: v, the stages per device; None: the default of the kind.

    Returns:
        The schedule, of vK stages.

    Raises:
        OptionError: an unknown kind, a count below 1, or a v that the kind does not have.
    """
    chosen = schedule_for(kind, stages, virtual_stages)
    _check_count("chunks", chunks)
    early = range(chosen.stages) if early_recompute else ()
    return chosen.scheduled(chunks, backward=backward, early_recompute=early)


def schedule_for(kind: str, devices: int, virtual_stages: int | None = None) -> DeviceSchedule:
    """A kind of schedule for K devices.

    Args:
        kind: a name in `KINDS`.
        devices: K >= 1.
        virtual_stages: v, the stages per device; None: the default of the kind.

    Raises:
        OptionError: an unknown kind, a count below 1, or a v that the kind does not have.
    """
    chosen = find_kind(kind)
    _check_count("stages", devices)
    return DeviceSchedule(chosen, devices, chosen.stages_per_device(virtual_stages))


def _check_count(what: str, count: int) -> None:
    if not hasattr(type(count), "__index__"):
        raise OptionError(f"`{what}`", expected="an integer >= 1", found=shown(count))
    if count < 1:
        raise OptionError(f"too few {what}", expected=f"{what} >= 1", found=shown(count))


def check_size(kind: str, stages: int, chunks: int, virtual_stages: int | None) -> None:
    """Refuse what would take minutes and all memory.

    Args:
        kind, stages, chunks, virtual_stages: as for `schedule`, not checked before.

    Raises:
        OptionError: the schedule would have too many actions.
    """
    v = KINDS[kind].virtual_stages if virtual_stages is None else virtual_stages
    counts = [max(n, 1) for n in (stages, chunks, v) if hasattr(type(n), "__index__")]
    if len(counts) < 3:
        return  # `schedule` says what is wrong
    actions, turns = counts[0] * counts[1] * counts[2], counts[0] ** 2 * counts[2]
    if actions > MOST_ACTIONS or turns > MOST_TURNS:
        raise OptionError(
            "the step is too large to be simulated",
            expected=f"at most {MOST_ACTIONS:,} stages times micro-batches, and at most"
            f" {MOST_TURNS:,} stages times devices",
            found=f"{_count(stages)} devices, {_count(v)} stages each,"
            f" {_count(chunks)} micro-batches",
        )


def _count(number: int) -> str:
    """A number in figures, unless they are so many that Python itself refuses to write them."""
    return str(number) if number.bit_length() < 100 else f"2^{number.bit_length() - 1} or more"


def find_kind(name: str) -> ScheduleKind:
    """Look up a kind.

    Args:
        name: what the user wrote.

    Raises:
        OptionError: there is none; the error lists the names.
    """
    if not isinstance(name, str) or name not in KINDS:
        names = ", ".join(map(repr, KINDS))
        raise OptionError("unknown schedule", expected=f"one of {names}", found=shown(name))
    return KINDS[name]
