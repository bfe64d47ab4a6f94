"""The timeline of a step, simulated or measured: its checks, a Gantt chart and a trace file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from autopipe.errors import OptionError, VerifyError

from .actions import Action, Scheduled
from .offloading import HostCopy

_COLUMNS = 88  # of the chart; 100 with the label

# Names from the palette of the trace viewers, by the main letter of an action.
_COLOURS = {
    "B": "rail_response",
    "F": "thread_state_running",
    "R": "thread_state_iowait",
    "W": "rail_idle",
}
_COPY = "thread_state_runnable"
_WAIT = "grey"


@dataclass(frozen=True)
class Span:
    """When one action ran, from `start` to `end`.

    A simulated action starts when its inputs have arrived. A measured one starts when its device
    turns to it, and may wait then: `waits` says when.

    Attributes:
        action: what ran.
        start, end: when.
        waits: (start, end) of each wait for messages, or for space in a queue, within the action.
        arrived: when its last message had arrived; None: at its start.
        sent: when it began to send its last message; None: at its end.
    """

    action: Action
    start: float
    end: float
    waits: tuple[tuple[float, float], ...] = ()
    arrived: float | None = None
    sent: float | None = None

    @property
    def waiting(self) -> float:
        """How long it waited."""
        return math.fsum(end - start for start, end in self.waits)

    @property
    def busy(self) -> float:
        """How long it computed: its time without its waits."""
        return max(0.0, self.end - self.start - self.waiting)


@dataclass(frozen=True)
class Timeline:
    """When each action of a step runs, in the unit of the given times; in seconds if measured.

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
        pause: (start, end) of the caller's own time between the last forward and the first other
            action (the loss, autograd); None where the step runs in one go, and if simulated.
        copies: for each device its copies to the host and back, if something is offloaded and the
            step is simulated.
    """

    makespan: float
    bubble: float
    spans: tuple[tuple[Span, ...], ...]
    in_flight: tuple[int, ...]
    peak_bytes: tuple[float, ...] | None = None
    pause: tuple[float, float] | None = None
    copies: tuple[tuple[HostCopy, ...], ...] = ()

    @property
    def pause_length(self) -> float:
        """The length of `pause`; 0 without one."""
        return self.pause[1] - self.pause[0] if self.pause else 0.0

    @property
    def busy(self) -> tuple[float, ...]:
        """For each device, how long it computed."""
        return tuple(math.fsum(span.busy for span in row) for row in self.spans)

    @property
    def waiting(self) -> tuple[float, ...]:
        """For each device, how long it waited for messages within its actions."""
        return tuple(math.fsum(span.waiting for span in row) for row in self.spans)

    @property
    def device_spans(self) -> tuple[float, ...]:
        """For each device, the time from the start of its first action to the end of its last."""
        return tuple(row[-1].end - row[0].start if row else 0.0 for row in self.spans)

    def verify(self, scheduled: Scheduled) -> None:
        """Check each device: its actions in order, one at a time, after their dependencies.

        Args:
            scheduled: the schedule that was simulated, or that ran.

        Raises:
            VerifyError: naming the device and the action.
        """
        ends = {
            Action(letter, span.action.stage, span.action.microbatch): (
                span.end if span.sent is None else span.sent
            )
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
                ready = span.start if span.arrived is None else span.arrived
                for need in span.action.needs(scheduled.stages):
                    if ready < ends[need]:
                        found = f"starts at {ready}, {need} ends at {ends[need]}"
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
        check_unit(microseconds)
        return trace_file(self.trace_events(microseconds))

    def trace_events(
        self, microseconds: float = 1e6, process: int = 0, name: str | None = None
    ) -> list[dict[str, object]]:
        """The events of `to_chrome_trace`; several timelines are processes of one file.

        Args:
            microseconds: length of the timeline's unit of time.
            process: number of the process.
            name: of the process.
        """
        events: list[dict[str, object]] = []
        if name is not None:
            events.append(_named("process_name", name, process))
        for device, row in enumerate(self.spans):
            here: dict[str, object] = {"pid": process, "tid": device}
            events.append({**_named("thread_name", f"device {device}", process), **here})
            for span in row:
                action = span.action
                colour = _COLOURS["B" if "B" in action.phase else action.phase]
                args = {"stage": action.stage, "microbatch": action.microbatch}
                times = (span.start * microseconds, span.end * microseconds)
                events.append(_event(str(action), action.phase, colour, times, here, args))
                for start, end in span.waits:
                    times = (start * microseconds, end * microseconds)
                    events.append(_event("wait", "wait", _WAIT, times, here, {}))
        for device, copies in enumerate(self.copies):
            for out in (True, False):
                own = [copy for copy in copies if copy.out == out]
                here = {"pid": process, "tid": len(self.spans) + 1 + 2 * device + out}
                name = f"device {device} {'to' if out else 'from'} the host"
                events += [{**_named("thread_name", name, process), **here}] * bool(own)
                events += [_copy_event(copy, microseconds, here) for copy in own]
        if self.pause is not None:
            here = {"pid": process, "tid": len(self.spans)}
            events.append({**_named("thread_name", "caller", process), **here})
            start, end = self.pause
            times = (start * microseconds, end * microseconds)
            events.append(_event("between the passes", "caller", _WAIT, times, here, {}))
        return events

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
        return "\n".join([title, *self.chart()])

    def chart(self, until: float | None = None) -> list[str]:
        """The lines of the Gantt chart, one per device.

        A ``-`` is a wait within an action, a ``.`` is idle.

        Args:
            until: the time at the right margin, for charts on one scale; None: the makespan.
        """
        scale = _COLUMNS / until if until else _COLUMNS / self.makespan if self.makespan else 0.0
        return [f"device {n:<3}  {self._draw(row, scale)}" for n, row in enumerate(self.spans)]

    def _draw(self, row: Sequence[Span], scale: float) -> str:
        cells = ["."] * _COLUMNS
        for span in row if scale else ():
            parts = [(_mark(span.action), span.start, span.end)]
            for mark, start, end in [*parts, *(("-", *wait) for wait in span.waits)]:
                first, last = round(start * scale), round(end * scale)
                cells[first:last] = mark * (last - first)
        return "".join(cells)


def _mark(action: Action) -> str:
    m = action.microbatch
    if action.phase in ("F", "R"):
        return str(m % 10) if action.phase == "F" else "'"
    return chr(ord("A" if action.phase == "W" else "a") + m % 26)


def check_unit(microseconds: float) -> None:
    """Check the length of a timeline's unit of time.

    Raises:
        OptionError: it is not finite and > 0.
    """
    if not 0 < microseconds < float("inf"):
        found = str(microseconds)
        raise OptionError("`microseconds`", expected="a finite length > 0", found=found)


def trace_file(events: Sequence[dict[str, object]]) -> str:
    """Events as the text of a trace file."""
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=1)


def _named(what: str, name: str, process: int) -> dict[str, object]:
    """An event that names a process or a thread."""
    return {"name": what, "ph": "M", "args": {"name": name}, "pid": process, "tid": 0}


def _copy_event(copy: HostCopy, microseconds: float, here: dict[str, object]) -> dict[str, object]:
    """The event of a copy to the host, or back."""
    what = "offload" if copy.out else "fetch"
    args = {"stage": copy.stage, "microbatch": copy.microbatch}
    times = (copy.start * microseconds, copy.end * microseconds)
    return _event(f"{what} {copy.stage}.{copy.microbatch}", what, _COPY, times, here, args)


def _event(
    name: str,
    category: str,
    colour: str,
    times: tuple[float, float],
    here: dict[str, object],
    args: dict[str, int],
) -> dict[str, object]:
    """A complete event."""
    start, end = times
    drawn = {"name": name, "cat": category, "cname": colour, "ph": "X"}
    return {**drawn, "ts": start, "dur": end - start, "args": args, **here}
