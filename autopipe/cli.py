"""The `autopipe` command line: parse the arguments, run a command, return an exit code.

The commands are the modules of `autopipe.commands`. Exit codes: 0; 1: the model cannot be planned;
2: an argument or a file is wrong. An exception in the user's own callable shows its traceback.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from autopipe.commands import all_commands
from autopipe.errors import AutopipeError, DeviceError, OptionError, PlanError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WRONG_ARGUMENT, CANNOT_PLAN = 2, 1

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
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except (DeviceError, OptionError, PlanError) as error:
        print(f"autopipe: {error}", file=sys.stderr)
        return WRONG_ARGUMENT
    except AutopipeError as error:
        print(f"autopipe: {error}", file=sys.stderr)
        # Without a node or source line, an option asks for something that is not implemented.
        asked = isinstance(error, UnsupportedError) and error.node is None and error.source is None
        return WRONG_ARGUMENT if asked else CANNOT_PLAN
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autopipe",
        description="Pipeline plans of PyTorch models: make, simulate, draw.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
