"""Every capture of a pipeline: why it happened and how long it took."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from autopipe.errors import printable
from autopipe.formatting import align_columns, format_seconds
from autopipe.passes.graph import warn_at_user_line

if TYPE_CHECKING:
    from autopipe.capture_reasons import CaptureReason
    from autopipe.compiled import CompiledModel

logger = logging.getLogger("autopipe")

UNEXPECTED = 4
"""At this capture a warning says why: training and evaluation with lengths have three or fewer."""

KEPT = 1000
"""Captures that are remembered."""

SAID_ONCE = ("value", "structure")
"""Kinds of reasons that are worth a warning when they come first."""


@dataclass
class CaptureEntry:
    """One capture.

    Attributes:
        number: 1 for the first.
        why: what changed, from what to what.
        capture: seconds to capture the graph and to cost it.
        cut: seconds to cut it into stages; with open options, to plan.
        trace: seconds to trace its stages and to generate code, so far.
        lengths: names of the sizes, besides the batch, that may have any value.
        programs: how many programs were generated for it, so far.
    """

    number: int
    why: str
    capture: float
    cut: float
    lengths: tuple[str, ...]
    trace: float = 0.0
    programs: int = 0


@dataclass(frozen=True)
class CaptureReport:
    """The captures of a pipeline, in order; `str` is a table.

    Attributes:
        entries: a `CaptureEntry` for each of the last 1000 captures.
        count: number of all captures.
    """

    entries: tuple[CaptureEntry, ...]
    count: int

    def __str__(self) -> str:
        if not self.entries:
            return "nothing has been captured yet"
        head = ("capture", "seconds", "cut", "trace", "programs", "lengths", "why")
        rows = [
            (
                str(e.number),
                format_seconds(e.capture),
                format_seconds(e.cut),
                format_seconds(e.trace),
                str(e.programs),
                ", ".join(e.lengths) or "-",
                e.why,
            )
            for e in self.entries
        ]
        return "\n".join(align_columns([head, *rows], left=(5, 6)))


@dataclass
class CaptureLog:
    """The captures of a pipeline.

    Attributes:
        count: how many there were.
    """

    count: int = 0
    _entries: deque[CaptureEntry] = field(default_factory=lambda: deque(maxlen=KEPT))
    _of: WeakKeyDictionary[CompiledModel, CaptureEntry] = field(default_factory=WeakKeyDictionary)
    _unasked: int = 0
    _said: set[str] = field(default_factory=set)

    def add(
        self, compiled: CompiledModel, reason: CaptureReason, capture: float, cut: float
    ) -> None:
        """Record a capture.

        Args:
            compiled: the captured model.
            reason: why.
            capture, cut: as in `CaptureEntry`.
        """
        self.count += 1
        lengths = tuple(str(length.name) for length in compiled.split.captured.lengths)
        entry = CaptureEntry(self.count, reason.text, capture, cut, lengths)
        self._entries.append(entry)
        self._of[compiled] = entry
        logger.info("capture %d, because: %s", self.count, printable(reason.text))

    def warn(self, reason: CaptureReason) -> None:
        """Warn of a capture that a call caused, if it is one to look at.

        Args:
            reason: why.
        """
        self._unasked += 1
        text = printable(reason.text)
        what = f"; what to do: {reason.remedy}" if reason.remedy else ""
        if self._unasked == UNEXPECTED:
            self._said.add(reason.kind)
            warn_at_user_line(
                f"the model has been captured {self._unasked} times; this time because of {text}"
                f"{what}. autopipe.explain_captures(pipe) lists all captures"
            )
        elif reason.kind in SAID_ONCE:
            self.say_once(
                reason.kind,
                f"{text}: the model is captured once more, as for each new combination{what}",
            )

    def say_once(self, kind: str, text: str) -> None:
        """Warn, unless there was a warning of this kind.

        Args:
            kind: any text.
            text: of the warning.
        """
        if kind not in self._said:
            self._said.add(kind)
            warn_at_user_line(f"{text} (said once)")

    def used(self, compiled: CompiledModel) -> None:
        """Take over what a captured model has traced so far."""
        entry = self._of.get(compiled)
        if entry is not None:
            entry.trace = compiled.programs.seconds
            entry.programs = compiled.programs.generated

    def report(self) -> CaptureReport:
        """What was recorded so far."""
        return CaptureReport(tuple(self._entries), self.count)
