"""Marks and clocks: the host's, and that of a device with streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopipe.runtime.backends import BACKENDS
from autopipe.runtime.recording import Clock, RecordedAction, StepRecording
from autopipe.runtime.transfer import WorkerDevice
from tests.support.recording import RecordingBackend

CPU = torch.device("cpu")


class Ticking(RecordingBackend):
    """Its device has a clock of its own: each mark is a tick of 1 ms after the one before."""

    ticks = 1000

    def mark(self, stream: Any) -> int:
        assert stream is not None
        self.ticks += 1
        return self.ticks

    def seconds_between(self, first: int, second: int) -> float:
        return (second - first) / 1000


def test_marks_of_the_host_are_seconds() -> None:
    clock = Clock(WorkerDevice(CPU))
    first, second = clock.mark(), clock.mark()
    seconds = clock.reader(first)
    assert seconds(first) == first <= seconds(second) == second


def test_marks_in_a_stream_are_put_on_the_clock_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", Ticking())
    clock = Clock(WorkerDevice(CPU))
    first, second, third = clock.mark(), clock.mark(), clock.mark()
    seconds = clock.reader(second)
    assert seconds(second) - seconds(first) == pytest.approx(1e-3)
    assert seconds(third) - seconds(second) == pytest.approx(1e-3)
    host = Clock.__init__.__globals__["time"].perf_counter()
    assert seconds(first) == pytest.approx(host, abs=60)  # the host's clock, not the device's


def test_a_recording_is_read_by_driver() -> None:
    clock = Clock(WorkerDevice(CPU))
    action = RecordedAction("forward_0", 3, clock, 1.0, 9.0, [(2.0, 4.0), (7.0, 8.0)], 4.0, 8.0)
    plain = RecordedAction("weights_1", 0, clock, 2.0, 3.0)
    one, two = StepRecording([[action], [plain]]).times()
    assert one == [("forward_0", 3, 1.0, 9.0, ((2.0, 4.0), (7.0, 8.0)), 4.0, 8.0)]
    assert two == [("weights_1", 0, 2.0, 3.0, (), None, None)]
    assert StepRecording([[]]).times() == [[]]


def test_workers_of_one_device_are_read_by_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """So their times are exact among each other: clocks agree to some microseconds only."""
    monkeypatch.setitem(BACKENDS, "cpu", Ticking())
    clocks = [Clock(WorkerDevice(CPU)), Clock(WorkerDevice(CPU))]
    clocks[1]._started += 5.0
    marks = [clocks[i].mark() for i in (0, 1, 0, 1)]
    one = RecordedAction("forward_0", 0, clocks[0], marks[0], marks[2])
    two = RecordedAction("forward_1", 0, clocks[1], marks[1], marks[3])
    ((first,), (second,)) = StepRecording([[one], [two]]).times()
    assert second.start - first.start == pytest.approx(1e-3)
    assert second.end - first.end == pytest.approx(1e-3)
