"""``autopipe simulate``: the timeline of a schedule, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.commands import Command
from autopipe.passes.schedule import KINDS, simulate

from ._output import say

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from autopipe.passes.schedule import Timeline

DESCRIPTION = """\
Simulate one training step of a schedule and draw it, one row per device: digits are forwards,
letters backwards, capitals a W that is apart from its B, ' an R that is apart from its B, dots are
idle time. Times are in any unit: the one that you use for --forward and --backward."""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    kinds = "; ".join(f"{kind.name}: {kind.summary}" for kind in KINDS.values())
    add("kind", metavar="KIND", help=kinds)
    add("--stages", required=True, type=int, metavar="K")
    add("--chunks", required=True, type=int, metavar="M", help="micro-batches")
    for name, default, what in (
        ("forward", None, "F, the forward"),
        ("backward", None, "B, the gradients of a stage's inputs (or all of its backward)"),
        ("weight", 0.0, "W, the gradients of its parameters (default: 0)"),
        ("recompute", 0.0, "R, rematerialization (default: 0)"),
    ):
        add(f"--{name}", required=default is None, default=default, type=_times, metavar="TIME",
            help=f"time of {what}; one, or one a stage: 18.5,18.5,19")  # fmt: skip
    add(
        "--early-recompute",
        action="store_true",
        help="R is an action of its own, before its B: it runs while the device waits",
    )
    free = ", ".join(kind.name for kind in KINDS.values() if kind.any_virtual_stages)
    add("--virtual-stages", type=int, metavar="V", help=f"stages per device, for {free}")
    add("--transfer", type=_time, default=0.0, metavar="TIME", help="between devices (default: 0)")


def _times(text: str) -> float | tuple[float, ...]:
    values = tuple(map(_time, text.split(",")))
    return values[0] if len(values) == 1 else values


def _time(text: str) -> float:
    return float(text)


_time.__name__ = _times.__name__ = "time"  # what argparse calls a wrong value


def _run(options: Namespace) -> None:
    line = simulate(
        options.kind,
        stages=options.stages,
        chunks=options.chunks,
        forward=options.forward,
        backward=options.backward,
        weight=options.weight,
        recompute=options.recompute,
        transfer=options.transfer,
        early_recompute=options.early_recompute,
        virtual_stages=options.virtual_stages,
    )
    say(f"{line}\n{_summary(line)}")


def _summary(line: Timeline) -> str:
    busy = [sum(span.end - span.start for span in row) for row in line.spans]
    speedup = f"{sum(busy) / line.makespan:.3f}" if line.makespan else "-"
    return (
        f"work {sum(busy):.6g}, busiest device {max(busy):.6g}\n"
        f"speed-up over one device {speedup}, of {len(line.spans)} at best"
    )


COMMAND = Command(
    name="simulate",
    help="time a schedule, without a model",
    description=DESCRIPTION,
    add_arguments=_add_arguments,
    run=_run,
)
