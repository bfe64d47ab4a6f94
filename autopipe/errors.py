"""All errors that autopipe raises deliberately, one class for each kind.

Every error has the same fields, and every message lists them in the same order: the problem, the
graph node, the line of the model, what was expected and found, and the remedy.

A new class only needs a docstring. If it has further arguments, its constructor passes these fields
to `AutopipeError` and stores the others as attributes.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


SELDOM_PRINTED = re.compile(r"[^\n\t\x20-\x7e]")
"""Characters that may have to be escaped: all but line feed, tab and printable ASCII."""


def printable(text: str) -> str:
    """Escape the characters of a text that a line or a terminal would not show as they are.

    These are the ends of lines that Python or `str.splitlines` knows besides the line feed, control
    characters, marks that change the direction of text, and halves of surrogate pairs.

    Args:
        text: for a person, or a comment of a program. Not a literal: backslashes stay.

    Returns:
        The text; without its line feeds and tabs, `str.isprintable` is true of it.
    """
    return SELDOM_PRINTED.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


class AutopipeError(Exception):
    """Base of all errors below.

    Args:
        problem: what happened, in one sentence.
        node: name of the graph node concerned, if any.
        source: ``file:line`` in the user's model, if known.
        expected: what would have been right.
        found: what was there instead.
        remedy: what the reader can do.

    The fields hold what they were given; the message has control characters escaped.
    """

    def __init__(
        self,
        problem: str,
        *,
        node: str | None = None,
        source: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        remedy: str | None = None,
    ) -> None:
        """Store the fields, and build the message from them."""
        self.problem = problem
        self.node = node
        self.source = source
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.problem]
        for name in ("node", "source", "expected", "found"):
            fact = getattr(self, name)
            lines += [] if fact is None else [f"  {name}: {fact}"]
        if self.remedy is not None:
            lines.append(f"  what to do: {self.remedy}")
        return printable("\n".join(lines))

    def at(self, source: str | None) -> Self:
        """Return a copy of this error with the line of the model that caused it.

        Args:
            source: ``file:line``; None if it is not known.
        """
        error = copy.copy(self)
        error.source = source
        error.args = (error._message(),)
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the constructor: classes differ in its arguments."""
        return _restore, (type(self), self.args), self.__dict__


def _restore(kind: type[AutopipeError], args: tuple[Any, ...]) -> AutopipeError:
    error = kind.__new__(kind)
    error.args = args  # (`__new__` of a base class with other arguments may not have set them)
    return error


class OptionError(AutopipeError, ValueError):
    """An argument of the public interface has a value that cannot be right (``chunks=0``)."""


class DeviceError(AutopipeError, ValueError):
    """The requested devices do not exist here, or cannot be used together."""


class CaptureError(AutopipeError, RuntimeError):
    """The model cannot be turned into a graph that computes the same thing."""


class CouplingError(AutopipeError, RuntimeError):
    """The model mixes the samples of a batch in a way that micro-batches would change."""


class InputError(AutopipeError, ValueError):
    """The inputs of a call have the wrong structure, dtypes or batch size."""


class PartitionError(AutopipeError, ValueError):
    """The graph cannot be cut into the requested number of stages."""


class MemoryLimitError(AutopipeError, ValueError):
    """No plan fits the memory limit; the message names the stage, missing bytes and a remedy.

    Attributes:
        missing_bytes: how much more the stage would need; None: not known to the byte.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        remedy: str | None = None,
        missing_bytes: int | None = None,
    ) -> None:
        """Store the facts, see `AutopipeError`, and the attributes."""
        super().__init__(problem, expected=expected, found=found, remedy=remedy)
        self.missing_bytes = missing_bytes


class PlanError(AutopipeError, ValueError):
    """A file is not a plan, or a plan does not fit this model."""


class VerifyError(AutopipeError, AssertionError):
    """A pass produced a program that breaks the rules of its type: a bug in autopipe."""


def require(condition: bool, problem: str, **facts: str | None) -> None:
    """Check one rule that a program or a plan must satisfy.

    Args:
        condition: whether it is satisfied.
        problem: what is wrong otherwise.
        facts: node, source, expected, found or remedy of the error.

    Raises:
        VerifyError: the condition is false.
    """
    if not condition:
        raise VerifyError(problem, **facts)


class UnsupportedError(AutopipeError, NotImplementedError):
    """A feature that autopipe recognizes but does not support."""


class StageError(AutopipeError, RuntimeError):
    """A stage failed while it ran; the original exception is the ``__cause__``.

    Attributes:
        stage: index of the stage.
        microbatch: index of the micro-batch that it was working on.
        phase: "F" for forward, or the letters of the backward phases.
    """

    def __init__(
        self,
        problem: str,
        *,
        stage: int | None,
        microbatch: int | None,
        phase: str | None,
        node: str | None = None,
        source: str | None = None,
        remedy: str | None = None,
    ) -> None:
        """Store the facts, see `AutopipeError`, and the attributes."""
        super().__init__(problem, node=node, source=source, remedy=remedy)
        self.stage = stage
        self.microbatch = microbatch
        self.phase = phase
