"""The text of `print(measured)`: measured times beside predicted ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.errors import printable
from autopipe.formatting import align_columns, format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.passes.schedule import Timeline
    from autopipe.planning.measured_data import MeasuredData

NOTHING = "no step was measured: run whole steps within `with pipe.profile() as measured:`"


def measured_text(measured: MeasuredData) -> str:
    """Format measured steps as text.

    Returns:
        A line on what ran, and three tables: the step, its devices, the stages' phases. In
        "simulated", a schedule is simulated with the measured times of phases.
    """
    if not measured.steps:
        return NOTHING
    plan, found = measured.plan, measured.found
    samples = " or ".join(str(s) for s in sorted(set(plan.sizes), reverse=True))
    count = len(measured.steps)
    lines = [
        f"{count} step{'s' * (count > 1)} of {plan.model}: {len(plan.stages)} stages on"
        f" {len(found.scheduled.devices)} devices, {len(plan.sizes)} micro-batches of {samples},"
        f" schedule {plan.schedule}",
        "",
        *align_columns(step_rows(measured), left=[0]),
        "",
        *align_columns(device_rows(measured)),
        "",
        *align_columns(phase_rows(measured), left=[1]),
        "",
        *notes(measured),
    ]
    return "\n".join(map(printable, lines))


def step_rows(measured: MeasuredData) -> list[tuple[str, ...]]:
    """The table of the step, its headings first."""
    lines = (measured.predicted, measured.simulated)
    rows = [
        ("", "predicted", "simulated", "measured"),
        (
            "step",
            *(format_seconds(line.makespan) for line in lines),
            format_seconds(measured.step_seconds),
        ),
        ("bubble", *(f"{line.bubble:.1%}" for line in lines), f"{measured.bubble:.1%}"),
    ]
    if measured.timeline.pause is not None:
        pause = format_seconds(measured.pause_seconds)
        rows.insert(2, ("caller, between the passes", "-", "-", pause))
    return rows


def device_rows(measured: MeasuredData) -> list[tuple[str, ...]]:
    """The table of the devices in the median step, its headings first."""
    line, predicted = measured.timeline, measured.predicted
    rows: list[tuple[str, ...]] = [
        ("device", "busy", "waiting", "idle", "predicted busy", "predicted idle")
    ]
    for device, (busy, waiting) in enumerate(zip(line.busy, line.waiting, strict=True)):
        idle = max(0.0, line.makespan - busy - waiting)
        rows.append(
            (
                str(device),
                *(_share(t, line) for t in (busy, waiting, idle)),
                _share(predicted.busy[device], predicted),
                _share(predicted.makespan - predicted.busy[device], predicted),
            )
        )
    return rows


def _share(seconds: float, line: Timeline) -> str:
    share = seconds / line.makespan if line.makespan else 0.0
    return f"{format_seconds(seconds)} {share:4.0%}"


def phase_rows(measured: MeasuredData) -> list[tuple[str, ...]]:
    """The table of the stages' phases, for one micro-batch, its headings first."""
    rows: list[tuple[str, ...]] = [
        ("stage", "phase", "predicted", "measured", "measured / predicted")
    ]
    for k, (stage, phases) in enumerate(
        zip(measured.plan.stages, measured.phase_seconds, strict=True)
    ):
        times = stage.times[0]
        seconds = {"F": times.forward, "R": times.recompute, "B": times.backward, "W": times.weight}
        for phase, found in phases.items():
            expected = sum(seconds[letter] for letter in phase)
            ratio = f"{found / expected:.2f}" if expected else "-"
            rows.append(
                (str(k), phase, format_seconds(expected), format_seconds(found), ratio),
            )
    return rows


def notes(measured: MeasuredData) -> Sequence[str]:
    """What the tables mean, and what they leave out."""
    line = measured.timeline
    found = [
        "measured times are medians; devices are those of the median step; predicted times are"
        f" {measured.plan.stages[0].speeds}; simulated: with the measured times of phases",
    ]
    if measured.transfers:
        most = max(measured.transfers.values())
        found.append(f"transfers take up to {format_seconds(most)} (median of each)")
    if line.pause is not None:
        found.append("idle includes the caller's time between the passes; the bubble does not")
    if measured.others:
        found.append(f"left out: {_many(measured.others, 'step')} of other programs")
    if measured.unfinished:
        calls = _many(measured.unfinished, "call")
        found.append(f"left out: {calls} without a whole backward in the block")
    return found


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"
