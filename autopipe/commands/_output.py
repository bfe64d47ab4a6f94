"""Print what a command says, and notice when nobody can read it."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from autopipe.errors import OptionError, describe, printable

if TYPE_CHECKING:
    from collections.abc import Iterator


def say(text: str) -> None:
    """Print a text, control characters escaped; quietly nothing if the reader has left.

    Args:
        text: one or more lines.

    Raises:
        OptionError: stdout cannot be written, for another reason than a closed pipe (``| head``).
    """
    with _stdout():
        print(printable(text, lines=True), flush=True)


def flush_output() -> None:
    """Write what is left in stdout's buffer: argparse's help, what the user's callable printed.

    Raises:
        OptionError: as `say`.
    """
    if sys.stdout is not None:
        with _stdout():
            sys.stdout.flush()


def reason(error: Exception) -> str:
    """Why a file cannot be read or written: ``plan.json: Permission denied``."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return describe(error)


def complain(text: str) -> None:
    """Write a message to stderr; if that is closed or full, the exit code must do."""
    if sys.stderr is not None:
        try:
            print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            _write_nowhere(sys.stderr)


@contextmanager
def _stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _write_nowhere(sys.stdout)
    except (OSError, ValueError) as error:  # a full disk; closed by the user's callable
        _write_nowhere(sys.stdout)
        found = f"stdout: {reason(error)}"
        raise OptionError("the output cannot be written", found=found) from error


def _write_nowhere(stream: TextIO) -> None:
    """Drop what a stream cannot write: else Python would fail again when it flushes at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
