"""Read plans and write results, for several commands."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autopipe.errors import AutopipeError, OptionError

from ._output import reason, say

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
    check_writable(target, keep=source, what="the plan")
    content = convert(load_plan(source)).encode()
    with writing():
        target.write_bytes(content)
    say(f"{target}: {len(content) / 1000:.0f} kB")


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
        raise OptionError("the plan cannot be read", found=reason(error)) from error


def check_writable(path: str | Path, *, keep: str | Path, what: str) -> None:
    """Check, before minutes of work, that the output can be written, as far as one can know.

    Args:
        path: of the output.
        keep: a file that the output must not replace; it need not exist.
        what: that file in words.

    Raises:
        OptionError: it would replace that file, there is no such folder, the path is a folder
            itself, or permissions forbid it.
    """
    with writing():
        path = os.path.abspath(path)
        there = _exists(path)
    if there and os.path.exists(keep) and os.path.samefile(path, keep):
        raise OptionError(f"the output would replace {what}", found=path)
    if not os.path.isdir(os.path.dirname(path)) or os.path.isdir(path):
        expected = "a file in a folder that exists"
        raise OptionError("the output cannot be written", expected=expected, found=path)
    if not os.access(path if there else os.path.dirname(path), os.W_OK):
        raise OptionError("the output cannot be written", found=f"{path}: no permission")


def _exists(path: str) -> bool:
    """Whether there is something; an OSError if there cannot be, for a name that is too long."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def writing() -> Iterator[None]:
    """Within this context, turn errors of writing into `OptionError`.

    Raises:
        OptionError: the file cannot be written.
    """
    try:
        yield
    except AutopipeError:
        raise
    except (OSError, ValueError) as error:  # a path with NUL is a ValueError
        raise OptionError("the output cannot be written", found=reason(error)) from error
