"""All errors that autopipe raises deliberately, one class for each kind.

Every error has the same fields, and every message lists them in the same order: the problem, the
graph node, the line of the model, what was expected and found, and the remedy.

A new class only needs a docstring. If it has further arguments, its constructor passes these fields
to `AutopipeError` and stores the others as attributes.

`printable`, `text_of`, `describe` and `shown` turn text, exceptions and values of others into text
that is safe to show: on a terminal, in a table, in a message.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


SELDOM_PRINTED = re.compile(r"[^\x20-\x7e]")
"""Characters that may have to be escaped: all but printable ASCII."""

LONGEST_DESCRIPTION = 500
"""Characters of `describe`, at most."""


def printable(text: str, *, lines: bool = False) -> str:
    """Escape what a terminal would obey instead of showing.

    Names in a plan, a model or a path may hold escape sequences, bidirectional controls, other
    invisible characters or lone surrogates. They become ``\\x1b``, ``\\u202e`` and so on, as in
    `repr`; everything else stays as it is. Text that was escaped before does not change again.

    Args:
        text: any text.
        lines: keep newlines and tabs.
    """
    if text.isprintable():
        return text

    def escaped(match: re.Match[str]) -> str:
        c = match[0]
        return c if c.isprintable() or (lines and c in "\n\t") else repr(c)[1:-1]

    return SELDOM_PRINTED.sub(escaped, text)


def text_of(error: BaseException) -> str:
    """The whole text of an exception, control characters escaped.

    An exception of the user's may fail while its text is made: then the text says so, and the
    failure does not take the exception's place.

    Args:
        error: any exception.
    """
    try:
        return printable(str.__str__(str(error)), lines=True)
    except Exception as failure:
        return f"(no text: its __str__ raised {_class_name(failure)})"


def describe(error: BaseException) -> str:
    """An exception as one line of limited length: ``KeyError: 'x'``.

    It is the exception's class and the first line of its text; see `text_of`. Never raises.

    Args:
        error: any exception.
    """
    kind = _class_name(error)
    first = next((line for line in text_of(error).splitlines() if line.strip()), "")
    return shortened(f"{kind}: {first.strip()}" if first else kind, LONGEST_DESCRIPTION)


def shown(value: object) -> str:
    """A value of the user's as in code, control characters escaped, of limited length.

    Its ``__repr__`` may fail: then the text names its class instead. Never raises.

    Args:
        value: anything.
    """
    try:
        return shortened(printable(str.__str__(repr(value)), lines=True), LONGEST_DESCRIPTION)
    except Exception:
        return f"<{_class_name(value)}>"


def _class_name(value: object) -> str:
    """The name of an object's class, past what a metaclass makes of ``__name__``."""
    return printable(str(type.__dict__["__name__"].__get__(type(value))))


def shortened(text: str, length: int) -> str:
    """Cut a text to a number of characters, the last one being an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


class AutopipeError(Exception):
    """Base of all errors below. Control characters in its message are escaped.

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
        return printable("\n".join(lines), lines=True)

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
        expected: str | None = None,
        found: str | None = None,
        remedy: str | None = None,
    ) -> None:
        """Store the facts, see `AutopipeError`, and the attributes."""
        super().__init__(
            problem, node=node, source=source, expected=expected, found=found, remedy=remedy
        )
        self.stage = stage
        self.microbatch = microbatch
        self.phase = phase
