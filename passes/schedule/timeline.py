"""The timeline of a simulated step: its checks, a Gantt chart and a trace file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from autopipe.errors import OptionError, VerifyError

from .actions import Action, Scheduled

_COLUMNS = 88  # of the chart; 100 with the label

# Names from the palette of the trace viewers, by the main letter of an action.
_COLOURS = {
    "B": "rail_response",
    "F": "thread_state_running",
    "R": "thread_state_iowait",
    "W": "rail_idle",
}


@dataclass(frozen=True)
class Span:
    """When one action ran, from `start` to `end`."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each action of a simulated step runs, in the unit of the given times.

    Attributes:
        makespan: end of the last action; the first starts at 0.
        bubble: idle share of the pipeline's time, 1 - work/span. Work is the busy time of the
            busiest device, for equal stages M(F + R + B + W); span is the longest time that a
            device takes from the start of its first action to the end of its last one
            (arXiv 2401.10241, Table 5).
        spans: for each device, its actions in order.
        in_flight: for each stage, the most micro-batches between forward and backward (its W).
        peak_bytes: for each device, the most bytes that micro-batches occupy at once, as
            `simulator.peak_bytes` counts them; None if `saved_bytes` was not given.
    """

    makespan: float
    bubble: float
    spans: tuple[tuple[Span, ...], ...]
    in_flight: tuple[int, ...]
    peak_bytes: tuple[float, ...] | None = None

    @property
    def device_spans(self) -> tuple[float, ...]:
        """For each device, the time from the start of its first action to the end of its last."""
        return tuple(row[-1].end - row[0].start if row else 0.0 for row in self.spans)

    def verify(self, scheduled: Scheduled) -> None:
        """Check each device: its actions in order, one at a time, after their dependencies.

        Args:
            scheduled: the schedule that was simulated.

        Raises:
            VerifyError: naming the device and the action.
        """
        ends = {
            Action(letter, span.action.stage, span.action.microbatch): span.end
            for row in self.spans
            for span in row
            for letter in span.action.phase
        }
        if tuple(tuple(span.action for span in row) for row in self.spans) != scheduled.devices:
            raise VerifyError("the timeline's actions are not the schedule's, in its order")
        for device, row in enumerate(self.spans):
            for one, two in pairwise(row):
                if two.start < one.end:
                    what = f"{two.action} on device {device} overlaps {one.action}"
                    raise VerifyError(what, expected=f">= {one.end}", found=f"{two.start}")
            for span in row:
                what = f"{span.action} on device {device}"
                if not 0 <= span.start <= span.end <= self.makespan:
                    raise VerifyError(f"{what} is not within the makespan", found=str(span))
                for need in span.action.needs(scheduled.stages):
                    if span.start < ends[need]:
                        found = f"starts at {span.start}, {need} ends at {ends[need]}"
                        raise VerifyError(f"{what} does not wait for {need}", found=found)

    def to_chrome_trace(self, microseconds: float = 1e6) -> str:
        """The timeline in the trace event format, JSON text for chrome://tracing or Perfetto.

        A thread per device, a complete event ("X") per action, named ``F2.0`` as in the schedule;
        its phase gives its category and colour.

        Args:
            microseconds: length of the timeline's unit of time: 1e6 if times are seconds, 1e3 if
                they are milliseconds.

        Raises:
            OptionError: `microseconds` is not finite and > 0.
        """
        if not 0 < microseconds < float("inf"):
            found = str(microseconds)
            raise OptionError("`microseconds`", expected="a finite length > 0", found=found)
        events: list[dict[str, object]] = []
        for device, row in enumerate(self.spans):
            here: dict[str, object] = {"pid": 0, "tid": device}
            name = {"name": f"device {device}"}
            events.append({"name": "thread_name", "ph": "M", "args": name, **here})
            for span in row:
                action = span.action
                events.append(
                    {
                        "name": str(action),
                        "cat": action.phase,
                        "cname": _COLOURS["B" if "B" in action.phase else action.phase],
                        "ph": "X",
                        "ts": span.start * microseconds,
                        "dur": (span.end - span.start) * microseconds,
                        "args": {"stage": action.stage, "microbatch": action.microbatch},
                        **here,
                    }
                )
        return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=1)

    def __str__(self) -> str:
        """A Gantt chart: digits are forwards, letters backwards (a: micro-batch 0).

        Capitals are a W that is not part of its B's action; ``'`` is such an R.
        """
        title = (
            f"makespan {self.makespan:.6g}, bubble {self.bubble:.4f}, "
            f"in flight {' '.join(map(str, self.in_flight))}"
        )
        if self.peak_bytes is not None:
            title += f", peak bytes {' '.join(f'{peak:.6g}' for peak in self.peak_bytes)}"
        rows = [f"device {device:<3}  {self._draw(row)}" for device, row in enumerate(self.spans)]
        return "\n".join([title, *rows])

    def _draw(self, row: Sequence[Span]) -> str:
        cells = ["."] * _COLUMNS
        for span in row if self.makespan else ():
            first, last = (round(t / self.makespan * _COLUMNS) for t in (span.start, span.end))
            cells[first:last] = _mark(span.action) * (last - first)
        return "".join(cells)


def _mark(action: Action) -> str:
    m = action.microbatch
    if action.phase in ("F", "R"):
        return str(m % 10) if action.phase == "F" else "'"
    return chr(ord("A" if action.phase == "W" else "a") + m % 26)
