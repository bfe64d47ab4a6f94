"""Read plans and write results, for several commands."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autopipe.errors import OptionError

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterator

    from autopipe.planning.plans import Plan


def add_plan_arguments(parser: ArgumentParser, ending: str) -> None:
    """Add the arguments of a command that reads a plan and writes a file.

    Args:
        parser: the command's.
        ending: of the default output, such as ``.html``.
    """
    parser.add_argument("plan", metavar="PLAN", help="a file that `autopipe plan -o` wrote")
    words = f"write there (default: PLAN with the ending {ending})"
    parser.add_argument("-o", "--output", metavar="FILE", help=words)


def convert_plan(options: Namespace, ending: str, convert: Callable[[Plan], str]) -> None:
    """Read the plan that the options name, write the result of `convert`, and print its path.

    Args:
        options: parsed from the arguments of `add_plan_arguments`.
        ending: of the default output.
        convert: plan → text of the output file.

    Raises:
        OptionError: a file cannot be read or written, or the output would replace the plan.
        PlanError: the file is no plan.
    """
    source = Path(options.plan)
    target = Path(options.output) if options.output else source.parent / f"{source.stem}{ending}"
    check_writable(target)
    plan = load_plan(source)
    if target.exists() and target.samefile(source):
        raise OptionError("the output would replace the plan", found=str(target))
    text = convert(plan)
    with writing():
        target.write_text(text, encoding="utf-8")
    say(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def load_plan(path: str | Path) -> Plan:
    """Read a plan.

    Args:
        path: of a file that `autopipe plan -o` wrote.

    Raises:
        OptionError: the file cannot be read.
        PlanError: the file is no plan.
    """
    from autopipe.planning.plans import Plan

    try:
        return Plan.load(path)
    except OSError as error:
        raise OptionError("the plan cannot be read", found=_reason(error)) from error


def say(text: str) -> None:
    """Print a text; exit quietly if the reader has closed the pipe (``| head``)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python would fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_writable(path: str | Path) -> None:
    """Check, before minutes of work, that the folder of the output exists.

    Raises:
        OptionError: there is no such folder, or the path is a folder itself.
    """
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise OptionError(
            "the output cannot be written", expected="a file in a folder that exists",
            found=str(path),
        )  # fmt: skip


@contextmanager
def writing() -> Iterator[None]:
    """Within this context, turn errors of writing into `OptionError`.

    Raises:
        OptionError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OptionError("the output cannot be written", found=_reason(error)) from error


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.strerror else str(error)
