"""The commands of `autopipe`, one module each.

To add a command, add a module here that defines `COMMAND`. The command line finds it automatically;
modules whose names begin with an underscore are not commands. Torch takes seconds to import, so a
module imports it (and modules that import it) only inside `run`.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ._output import complain as complain
from ._output import flush_output as flush_output

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: what the user types.
        help: one line for the list of commands.
        description: for the command's own help.
        add_arguments: adds its arguments to its parser.
        run: executes it. Errors of `autopipe.errors` become messages and exit codes.
    """

    name: str
    help: str
    description: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]


def all_commands() -> tuple[Command, ...]:
    """Import the modules of this package and collect their commands, sorted by name."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    found: list[Command] = [import_module(f"{__name__}.{name}").COMMAND for name in names]
    return tuple(sorted(found, key=lambda command: command.name))
