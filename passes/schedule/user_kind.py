"""A user's schedule as a `ScheduleKind`: a function of K and M, or a `Scheduled`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from autopipe.errors import OptionError, describe

from .actions import Scheduled
from .device_schedule import DeviceSchedule
from .kinds import KINDS
from .schedule_kind import Order, RawAction, ScheduleKind
from .user_schedule import Entry, scheduled_from_lists

UserFunction = Callable[[int, int], Sequence[Sequence[Entry]]]
"""From (K, M) to the actions of each device, in order."""

_SUMMARY = "your own"


def schedule_of_function(
    function: UserFunction, devices: int, chunks: int | None
) -> DeviceSchedule:
    """The schedule that a user's function gives.

    It is called once for each number of micro-batches that is needed: the last batch of an epoch
    often has fewer. Stages must be on the same devices for all of them.

    Args:
        function: from (K, M) to lists of actions, as `scheduled_from_lists` takes them, or to a
            `Scheduled`.
        devices: K.
        chunks: a number of micro-batches to look at now; None: K.

    Raises:
        OptionError: it fails, or what it returns is no valid schedule for K devices and M
            micro-batches.
    """
    name = _own_name(getattr(function, "__name__", type(function).__name__))
    example = chunks or devices
    order = _FunctionOrder(name, function)
    rows = order(devices, example, 1)
    kind = ScheduleKind(
        name, order, _SUMMARY, forwards_first=_forwards_first(rows), example_chunks=example
    )
    return DeviceSchedule(kind, devices)


def schedule_of_rows(scheduled: Scheduled) -> DeviceSchedule:
    """The same schedule for its own number of micro-batches, or fewer: the surplus is dropped.

    Args:
        scheduled: a valid schedule.
    """
    rows = _rows(scheduled)
    kind = ScheduleKind(
        _own_name(scheduled.kind),
        _FixedOrder(_own_name(scheduled.kind), rows, scheduled.chunks),
        _SUMMARY,
        forwards_first=_forwards_first(rows),
        most_chunks=scheduled.chunks,
    )
    return DeviceSchedule(kind, len(rows))


def is_own(kind: ScheduleKind) -> bool:
    """Whether a kind is a user's, not one of `KINDS`."""
    return KINDS.get(kind.name) is not kind


@dataclass(frozen=True)
class _FunctionOrder:
    """A user's function as an order function. (A class, so that it can be pickled.)"""

    name: str
    function: UserFunction = field(hash=False)

    def __call__(self, K: int, M: int, v: int) -> Order:
        what = f"schedule {self.name!r} for {K} devices and {M} micro-batches"
        try:
            rows: Any = self.function(K, M)
        except Exception as error:
            raise OptionError(f"{what} fails", found=describe(error)) from error
        if isinstance(rows, Scheduled):
            rows = rows.devices
        scheduled = scheduled_from_lists(self.name, rows)
        if len(scheduled.devices) != K or scheduled.chunks != M:
            found = f"{len(scheduled.devices)} devices, {scheduled.chunks} micro-batches"
            raise OptionError(what, expected="actions for these", found=found)
        return [list(row) for row in _rows(scheduled)]


@dataclass(frozen=True)
class _FixedOrder:
    """The rows of a schedule as an order function."""

    name: str
    rows: tuple[tuple[RawAction, ...], ...]
    chunks: int

    def __call__(self, K: int, M: int, v: int) -> Order:
        if len(self.rows) != K or self.chunks < M:
            raise OptionError(
                f"schedule {self.name!r} is for other sizes",
                expected=f"{len(self.rows)} devices, at most {self.chunks} micro-batches",
                found=f"{K} devices, {M} micro-batches",
                remedy=f"use chunks={self.chunks}, or give a function (K, M) -> lists of actions",
            )
        return [[action for action in row if action[2] < M] for row in self.rows]


def _rows(scheduled: Scheduled) -> tuple[tuple[RawAction, ...], ...]:
    """What devices run, without R, unless the user placed it: as an action of its own."""
    placed = any(action.phase == "R" for row in scheduled.devices for action in row)
    return tuple(
        tuple((a.phase if placed else a.phase.replace("R", ""), a.stage, a.microbatch) for a in row)
        for row in scheduled.devices
    )


def _forwards_first(rows: Sequence[Sequence[RawAction]]) -> bool:
    """Whether each device runs all its forwards before anything else."""
    order = [[letters != "F" for letters, _, _ in row] for row in rows]
    return all(row == sorted(row) for row in order)


def _own_name(name: str) -> str:
    """A name that no kind has and that can be printed; a plan's file has it already."""
    own = "own "
    return (
        name if name.startswith(own) or (name.isidentifier() and name not in KINDS) else own + name
    )
