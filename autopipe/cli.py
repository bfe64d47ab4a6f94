"""The `autopipe` command line: parse the arguments, run a command, return an exit code.

The commands are the modules of `autopipe.commands`. Exit codes: 0; 1: the model cannot be planned;
2: an argument, a file or the user's own callable is wrong; 130: interrupted. Messages go to stderr,
without a traceback. Both streams take any text: what their encoding lacks is escaped.
"""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from autopipe.commands import all_commands, complain, flush_output
from autopipe.errors import (
    AutopipeError,
    DeviceError,
    OptionError,
    PlanError,
    UnsupportedError,
    printable,
    shortened,
)
from autopipe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WRONG_ARGUMENT, CANNOT_PLAN, INTERRUPTED = 2, 1, 130

LONGEST_MESSAGE = 1000
"""Characters of a message about an argument."""

EXAMPLES = """\
examples:
  autopipe plan examples/gpt2_xl.py:training --devices 8 --memory 80GiB --device h100 -o plan.json
  autopipe report plan.json -o plan.html
  autopipe simulate 1f1b --stages 8 --chunks 24 --forward 18.5 --backward 27.4"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: by argparse, for help (0) and unknown arguments (2).
    """
    with _any_text():
        try:
            try:
                options = _parser().parse_args(arguments)
                run: Callable[[argparse.Namespace], None] = options.run
                run(options)
            finally:
                flush_output()
        except KeyboardInterrupt:
            return INTERRUPTED
        except AutopipeError as error:
            complain(f"autopipe: {error}")
            return _code(error)
    return 0


def _code(error: AutopipeError) -> int:
    if isinstance(error, (DeviceError, OptionError, PlanError)):
        return WRONG_ARGUMENT
    # Without a node or source line, an option asks for something that is not implemented.
    asked = isinstance(error, UnsupportedError) and error.node is None and error.source is None
    return WRONG_ARGUMENT if asked else CANNOT_PLAN


@contextmanager
def _any_text() -> Iterator[None]:
    """Let stdout and stderr take characters that their encoding lacks, as escapes."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [(s, s.errors) for s in streams if not s.closed]
    for stream, _ in before:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            with suppress(OSError, ValueError):  # the command may have closed it
                stream.reconfigure(errors=errors)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        text = shortened(printable(message), LONGEST_MESSAGE)
        complain(f"{self.prog}: {text} (see {self.prog} --help)")
        raise SystemExit(WRONG_ARGUMENT)


def _parser() -> _Parser:
    parser = _Parser(
        prog="autopipe",
        description="Pipeline plans of PyTorch models: make, simulate, draw.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in all_commands():
        own = parsers.add_parser(
            command.name,
            help=command.help,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser
