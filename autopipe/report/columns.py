"""`Column`, a column of a table; and the columns of the table of stages.

To add a column to that table, add an entry to `STAGE_COLUMNS`: `explain()`, ``print(plan)`` and the
page show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from autopipe.formatting import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autopipe.planning.plan_data import PlanData
    from autopipe.planning.plan_parts import DeviceTotal, StagePlan

Row = TypeVar("Row")


def _always(rows: Sequence[object]) -> bool:
    return True


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column of a table.

    Attributes:
        heading: its title.
        cell: the text of a row's cell. It is plain text: the page escapes it.
        words: True if cells are words, flush left; else they are numbers, flush right.
        code: whether the page shows cells as code (names that come from the model).
        shown: where the column is shown: in the "text" table, on the HTML "page", or in "both".
        when: tells whether a table with these rows has the column.
    """

    heading: str
    cell: Callable[[Row], str]
    words: bool = False
    code: bool = False
    shown: Literal["text", "page", "both"] = "both"
    when: Callable[[Sequence[Row]], bool] = _always


def columns_of(
    columns: Sequence[Column[Row]], rows: Sequence[Row], shown: Literal["text", "page"]
) -> list[Column[Row]]:
    """Select the columns that a table has.

    Args:
        columns: all columns, in order.
        rows: the table's rows.
        shown: the kind of table.
    """
    return [c for c in columns if c.shown in (shown, "both") and c.when(rows)]


@dataclass(frozen=True)
class StageRow:
    """A row of the table of stages: stage `index` of a plan."""

    plan: PlanData
    index: int

    @property
    def stage(self) -> StagePlan:
        """The plan's entry for the stage."""
        return self.plan.stages[self.index]

    @property
    def home(self) -> int:
        """The index of its device."""
        return self.plan.order.homes[self.index]

    @property
    def shares_device(self) -> bool:
        """Whether devices have several stages each."""
        return self.plan.devices < len(self.plan.stages)

    def seconds(self, time: float) -> str:
        """A time, with the digits that the plan's times deserve."""
        return format_seconds(time, self.plan.digits)

    def share_of_work(self, none: str) -> str:
        """The stage's share of the work; `none` if there is no work."""
        share = self.plan.share_of_work(self.index)
        return none if share is None else f"{share:.1%}"


def stage_rows(plan: PlanData) -> list[StageRow]:
    """Rows for all stages of a plan."""
    return [StageRow(plan, k) for k in range(len(plan.stages))]


def _policies_differ(rows: Sequence[StageRow]) -> bool:
    return len({row.stage.remat for row in rows}) > 1


def _some_offload(rows: Sequence[StageRow]) -> bool:
    return any(row.stage.offloaded_bytes for row in rows)


def _offloaded(row: StageRow) -> str:
    """Micro-batches that wait on the host, bytes of each, and how long a copy of them takes."""
    seconds = row.stage.times[0].offload
    time = f" in {row.seconds(seconds)}" if seconds else ""
    count = row.plan.offload_counts[row.index]
    return f"{count} × {format_bytes(row.stage.offloaded_bytes)}{time}" if count else "-"


def _sent_in_total(row: StageRow) -> str:
    """Each tensor once, shared parameters included."""
    return format_bytes(row.plan.boundary_bytes(row.index))


def _memory_and_limit(row: StageRow) -> str:
    if row.shares_device:  # the limit is of all stages on the device
        return format_bytes(row.stage.memory_bytes)
    return used_and_limit(row.plan.totals[row.home])


def used_and_limit(total: DeviceTotal) -> str:
    """The memory that a device needs, and its limit if there is one."""
    used, limit = format_bytes(total.memory_bytes), total.limit_bytes
    return used if limit is None else f"{used} of {format_bytes(limit)}"


def _device(row: StageRow) -> str:
    device = row.stage.planned_device
    return f"{row.home}: {device}" if row.shares_device else device


STAGE_COLUMNS: tuple[Column[StageRow], ...] = (
    Column("stage", lambda r: str(r.index)),
    Column("device", _device, words=True),
    Column("modules", lambda r: r.stage.modules, words=True, code=True, shown="page"),
    Column("calls", lambda r: str(r.stage.calls), shown="text"),
    Column("calls", lambda r: f"{r.stage.calls:,}", shown="page"),
    Column("parameters", lambda r: format_bytes(r.stage.parameter_bytes), shown="text"),
    Column(
        "parameters",
        lambda r: f"{len(r.stage.parameters):,}, {format_bytes(r.stage.parameter_bytes)}",
        shown="page",
    ),
    Column("flops", lambda r: f"{r.stage.flops:.2e}", shown="text"),
    Column("FLOP", lambda r: format_count(r.stage.flops), shown="page"),
    Column("forward", lambda r: r.seconds(r.stage.forward_seconds), shown="page"),
    Column("recompute", lambda r: r.seconds(r.stage.recompute_seconds), shown="page"),
    Column("backward", lambda r: r.seconds(r.stage.backward_seconds), shown="page"),
    Column("load", lambda r: r.share_of_work("-"), shown="text"),
    Column("load", lambda r: r.share_of_work("none"), shown="page"),
    Column("receives", lambda r: format_bytes(r.plan.received_bytes(r.index)), shown="page"),
    Column("sends", _sent_in_total, shown="text"),
    Column("sends", lambda r: format_bytes(r.plan.sent_bytes(r.index)), shown="page"),
    Column("saves", lambda r: f"{r.stage.in_flight} × {format_bytes(r.stage.saved_bytes)}"),
    Column("offloads", _offloaded, when=_some_offload),
    Column("memory", _memory_and_limit, shown="text"),
    Column("remat", lambda r: r.stage.remat, shown="text", when=_policies_differ),
)
"""What the tables of stages show, in order."""
