"""``autopipe trace``: a plan's simulated step as a trace file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.commands import Command

from ._files import add_plan_arguments, convert_plan

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

ENDING = ".trace.json"


def _add_arguments(parser: ArgumentParser) -> None:
    add_plan_arguments(parser, ENDING)


def _run(options: Namespace) -> None:
    convert_plan(options, ENDING, lambda plan: plan.timeline.to_chrome_trace())


COMMAND = Command(
    name="trace",
    help="a plan's timeline for trace viewers",
    description="Write a plan's simulated step as trace events, for chrome://tracing or Perfetto.",
    add_arguments=_add_arguments,
    run=_run,
)
