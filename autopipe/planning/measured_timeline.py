"""Turn what one run recorded into a `Timeline`, and a timeline's transfers into times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.passes.codegen import verb
from autopipe.passes.schedule import Span, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autopipe.passes.schedule import Action, Scheduled
    from autopipe.runtime.recording import RecordedTimes

Transfer = tuple[str, int, int]
"""The letter of the phase that sends ("F" or "B"), the stage that sends, the one that receives."""


def measured_timeline(
    scheduled: Scheduled, rows: Sequence[Sequence[RecordedTimes]], *, passes: int
) -> Timeline:
    """The timeline of a step that ran, in seconds from the start of its first action.

    Args:
        scheduled: what the program's devices run.
        rows: what each device ran.
        passes: 2 if the caller's loss stood between all forwards and the rest, else 1.
    """
    actions = {(verb(a.phase), a.stage, a.microbatch): a for row in scheduled.devices for a in row}
    origin = min(times.start for row in rows for times in row)

    def span(times: RecordedTimes) -> Span:
        name, _, stage = times.function.rpartition("_")
        return Span(
            actions[name, int(stage), times.microbatch],
            times.start - origin,
            times.end - origin,
            tuple((start - origin, end - origin) for start, end in times.waits),
            None if times.arrived is None else times.arrived - origin,
            None if times.sent is None else times.sent - origin,
        )

    spans = tuple(tuple(map(span, row)) for row in rows)
    pause = _pause(spans) if passes == 2 else None
    line = Timeline(
        makespan=max(row[-1].end for row in spans),
        bubble=0.0,
        spans=spans,
        in_flight=scheduled.in_flight(),
        pause=pause,
    )
    return Timeline(line.makespan, _bubble(line), spans, line.in_flight, pause=pause)


def _pause(spans: Sequence[Sequence[Span]]) -> tuple[float, float]:
    """From the end of the last forward to the start of the first other action."""
    every = [span for row in spans for span in row]
    ended = max(span.end for span in every if span.action.phase == "F")
    return ended, max(ended, min(span.start for span in every if span.action.phase != "F"))


def _bubble(line: Timeline) -> float:
    """1 - work/span as for a simulated step; the caller's own time is no part of the span."""
    lengths = [
        row[-1].end - (row[0].start if row[0].arrived is None else row[0].arrived)
        for row in line.spans
    ]
    longest = max(lengths) - line.pause_length
    return max(0.0, 1 - max(line.busy) / longest) if longest > 0 else 0.0


def waited_transfers(scheduled: Scheduled, line: Timeline) -> Iterator[tuple[Transfer, float]]:
    """Times from the start of sending a message until the device that waited for it had it.

    Only where the receiver waited from before that: else nothing tells when the message arrived.

    Args:
        scheduled: the schedule that ran.
        line: its measured timeline.
    """
    home = {a.stage: device for device, row in enumerate(scheduled.devices) for a in row}
    by_letter: dict[tuple[str, int, int], Span] = {}
    for row in line.spans:
        for span in row:
            a = span.action
            by_letter |= {(letter, a.stage, a.microbatch): span for letter in a.phase}
    for row in line.spans:
        for span in row:
            found = [
                (sender.sent, need)
                for need in span.action.needs(scheduled.stages)
                if home[need.stage] != home[span.action.stage]
                and (sender := by_letter[_key(need)]).sent is not None
            ]
            if not found or span.arrived is None:
                continue
            sent, need = max((s, n) for s, n in found if s is not None)
            if span.start <= sent <= span.arrived:
                yield (need.phase, need.stage, span.action.stage), span.arrived - sent


def _key(action: Action) -> tuple[str, int, int]:
    return action.phase, action.stage, action.microbatch
