"""Every error autopipe raises on purpose, one class per kind.

Each carries the same five facts, so that a message answers the reader's questions in the same
order every time: what happened, at which node, on which line of the model, what was expected and
found, and what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class AutopipeError(Exception):
    """Base of all errors below.

    Args:
        problem: what happened, one sentence.
        node: name of the graph node concerned, if one is.
        source: ``file:line`` in the user's model, if known.
        expected: what would have been right.
        found: what was there instead.
        remedy: what the reader can do.
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
        self.problem = problem
        self.node = node
        self.source = source
        self.expected = expected
        self.found = found
        self.remedy = remedy
        lines = [problem]
        facts = {"node": node, "source": source, "expected": expected, "found": found}
        lines += [f"  {name}: {fact}" for name, fact in facts.items() if fact is not None]
        if remedy is not None:
            lines.append(f"  what to do: {remedy}")
        super().__init__("\n".join(lines))

    def at(self, source: str | None) -> Self:
        """The same error, with the line of the model that it is about."""
        facts = {n: getattr(self, n) for n in ("node", "expected", "found", "remedy")}
        return type(self)(self.problem, source=source, **facts)


class OptionError(AutopipeError, ValueError):
    """An argument of the public interface has a value that cannot be right (``chunks=0``)."""


class DeviceError(AutopipeError, ValueError):
    """The devices asked for do not exist here, or do not fit one another."""


class CaptureError(AutopipeError, RuntimeError):
    """The model cannot be turned into a graph that computes the same thing."""


class CouplingError(AutopipeError, RuntimeError):
    """The model mixes samples of a batch in a way that micro-batches would change."""


class InputError(AutopipeError, ValueError):
    """A call's inputs do not have the structure, types or batch size that they need."""


class PartitionError(AutopipeError, ValueError):
    """The graph cannot be cut into the stages asked for."""


class MemoryLimitError(AutopipeError, ValueError):
    """No plan keeps the memory limit: which stage, how much is missing, and what would fit.

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
        super().__init__(problem, expected=expected, found=found, remedy=remedy)
        self.missing_bytes = missing_bytes


class PlanError(AutopipeError, ValueError):
    """A file is no plan, or a plan is not one for this model."""


class VerifyError(AutopipeError, AssertionError):
    """A pass produced a program that breaks its own rules: a bug in autopipe."""


def require(condition: bool, problem: str, **facts: str | None) -> None:
    """One rule that a program or a plan keeps.

    Raises:
        VerifyError: it does not.
    """
    if not condition:
        raise VerifyError(problem, **facts)


class UnsupportedError(AutopipeError, NotImplementedError):
    """Something that autopipe knows of but does not implement."""


class StageError(AutopipeError, RuntimeError):
    """A stage failed while it ran; the original exception is the ``__cause__``.

    Attributes:
        stage: index of the stage.
        microbatch: index of the micro-batch it was working on.
        phase: "F" forward, or the letters of the backward phases.
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
        super().__init__(problem, node=node, source=source, remedy=remedy)
        self.stage = stage
        self.microbatch = microbatch
        self.phase = phase
