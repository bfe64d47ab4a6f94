"""Choose a schedule, with the number of stages per device: ``schedule="auto"``.

Each kind is planned as if the user had named it; the plan with the shortest predicted step wins.
The simulator knows no cost of an action besides its ops, and every further stage costs memory and
transfers that it knows only in part. So a kind must be faster than those before it in the table by
more than a small fraction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autopipe import results
from autopipe.errors import MemoryLimitError, PartitionError, UnsupportedError
from autopipe.formatting import format_seconds
from autopipe.passes.ir import B
from autopipe.passes.loss_seeds import loss_seeds, needs_parameters
from autopipe.passes.one_at_a_time import one_at_a_time
from autopipe.passes.schedule import KINDS, schedule_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from autopipe.passes.ir import Captured
    from autopipe.passes.schedule import DeviceSchedule
    from autopipe.planning.plans import Plan

WORTHWHILE = 0.01
"""A schedule further down the table must shorten the step by this fraction."""

STAGES_PER_DEVICE = (2, 3, 4)
"""What is tried where a kind leaves the number open."""


def schedules_to_try(devices: int, *, early: bool) -> Iterator[DeviceSchedule]:
    """The schedules that are compared, the simplest first.

    Args:
        devices: K.
        early: whether a backward may start before the last forward has ended.
    """
    for kind in KINDS.values():
        if early or kind.forwards_first:
            several = STAGES_PER_DEVICE if kind.any_virtual_stages else (kind.virtual_stages,)
            for v in several:
                yield schedule_for(kind.name, devices, v)


def why_not_early(model: nn.Module, captured: Captured, batch: int) -> str | None:
    """Why no backward of a model can start before its last forward has ended; None if it can.

    Args:
        model: the user's module.
        captured: its graph.
        batch: samples in a batch.
    """
    if not model.training:
        return "the model is in evaluation mode"
    sizes = {B: batch, **{x.name: x.example for x in captured.lengths}}

    def evaluate(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return results.run_epilogue(captured, outputs, sizes, model.get_buffer)

    meta = any(b.is_meta for b in model.buffers())
    examples = results.example_outputs(captured, sizes, "meta" if meta else "cpu")
    try:
        with one_at_a_time():  # a trace patches torch
            loss_seeds(captured, needs_parameters(captured), evaluate, [*examples.values()])
    except UnsupportedError as error:
        return error.problem
    return None


def fastest(
    schedules: Iterator[DeviceSchedule], plan: Callable[[DeviceSchedule], Plan]
) -> tuple[DeviceSchedule, str]:
    """Plan each schedule, and choose.

    Args:
        schedules: the simplest first.
        plan: makes the best plan under a schedule.

    Returns:
        The schedule, and the comparison in words.

    Raises:
        MemoryLimitError, PartitionError: there is no plan under any of them.
    """
    plans: dict[DeviceSchedule, Plan] = {}
    failures: dict[DeviceSchedule, MemoryLimitError | PartitionError] = {}
    for order in schedules:
        try:
            plans[order] = plan(order)
        except (MemoryLimitError, PartitionError) as error:
            failures[order] = error
    if not plans:
        missing = [e for e in failures.values() if isinstance(e, MemoryLimitError)]
        raise (
            min(missing, key=lambda e: e.missing_bytes or 0)
            if missing
            else next(iter(failures.values()))
        )
    best, *others = plans
    for order in others:
        if plans[order].step_seconds < plans[best].step_seconds * (1 - WORTHWHILE):
            best = order
    return best, _comparison(best, plans, failures)


def _comparison(
    best: DeviceSchedule,
    plans: dict[DeviceSchedule, Plan],
    failures: dict[DeviceSchedule, MemoryLimitError | PartitionError],
) -> str:
    """Why a schedule was chosen, in words."""
    steps = sorted((p.step_seconds, i, order) for i, (order, p) in enumerate(plans.items()))
    compared = ", ".join(
        f"{_named(order)} {format_seconds(seconds, plans[order].digits)}"
        for seconds, _, order in steps
    )
    text = f"schedule {_named(best)} was chosen; predicted steps: {compared}"
    large = [_named(o) for o, e in failures.items() if isinstance(e, MemoryLimitError)]
    small = [_named(o) for o, e in failures.items() if isinstance(e, PartitionError)]
    text += f"; too large for the memory: {', '.join(large)}" if large else ""
    return text + (f"; too few ops for the stages of {', '.join(small)}" if small else "")


def _named(order: DeviceSchedule) -> str:
    several = f" with {order.virtual_stages} stages per device" * order.kind.any_virtual_stages
    return order.name + several


def with_note(plan: Plan, note: str) -> Plan:
    """The plan with one more note for the user."""
    return replace(plan, notes=(*plan.notes, note))
