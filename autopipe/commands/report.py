"""``autopipe report``: a plan as one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.commands import Command

from ._files import add_plan_arguments, convert_plan

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

ENDING = ".html"


def _add_arguments(parser: ArgumentParser) -> None:
    add_plan_arguments(parser, ENDING)


def _run(options: Namespace) -> None:
    from autopipe.report.page import page

    convert_plan(options, ENDING, page)


COMMAND = Command(
    name="report",
    help="draw a plan: one HTML page",
    description="Write a plan as one HTML page that needs no network and no scripts.",
    add_arguments=_add_arguments,
    run=_run,
)
