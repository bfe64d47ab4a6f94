"""A recorded run tells waiting from computing, by a clock that the test turns by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopipe.errors import StageError
from autopipe.runtime.backends import BACKENDS
from autopipe.runtime.backends.cpu import CpuBackend
from autopipe.runtime.load import load_source
from autopipe.runtime.mailbox import Key, Mailbox
from autopipe.runtime.memory import SavedBytesCounter
from autopipe.runtime.program import Program
from autopipe.runtime.recorded_run import RecordedRun
from autopipe.runtime.recording import Clock, RecordedTimes
from autopipe.runtime.transfer import WorkerDevice

CPU = torch.device("cpu")
LIMIT = 60

SOURCE = """
def forward_0(run, m, compute):
    value = compute(m)
    run.send("h", 0, 1, m, value)

def forward_1(run, m, compute):
    compute(m, run.receive("h", 1, m))

def device_0_forward(run):
    forward_0(run, 0, F_0)
    forward_0(run, 1, F_0)

def device_1_forward(run):
    forward_1(run, 0, F_1)
    forward_1(run, 1, F_1)
"""


class HandClock(CpuBackend):
    """Time passes where the test says so."""

    now = 0.0

    def mark(self, stream: Any) -> float:
        return self.now


def recorded(
    zero: Callable[[int], torch.Tensor], one: Callable[[int, torch.Tensor], None], slots: int = 9
) -> tuple[RecordedRun, dict[str, Any]]:
    """A run of `SOURCE` with these computations."""
    names, filename = load_source(SOURCE)
    names |= {"F_0": zero, "F_1": one}
    workers = (WorkerDevice(CPU), WorkerDevice(CPU))
    program = Program(
        forward=(names["device_0_forward"], names["device_1_forward"]),
        backward=(),
        step=(),
        drivers=workers,
        workers=workers,
        sizes=(1, 1),
        draws={1: [[], []]},
        strides={},
        filename=filename,
        symbols={1: ()},
        queues={("h", 1): slots},
    )
    clocks = {w: Clock(w) for w in workers}
    return RecordedRun(program, [[], []], {}, 0, SavedBytesCounter([0, 1]), clocks=clocks), names


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    backend = HandClock()
    monkeypatch.setitem(BACKENDS, "cpu", backend)
    return backend


def test_a_wait_for_a_message_is_no_computing(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = [threading.Event(), threading.Event()]
    take = Mailbox.take

    def taking(self: Mailbox, key: Key) -> Any:
        waits[key[2]].set()
        return take(self, key)

    def zero(m: int) -> torch.Tensor:
        assert waits[m].wait(LIMIT)  # stage 1 waits already
        clock.now += 5
        return torch.ones(1)

    def one(m: int, value: torch.Tensor) -> None:
        clock.now += 2

    monkeypatch.setattr(Mailbox, "take", taking)
    run, names = recorded(zero, one)
    untouched = {name: names[name] for name in names}
    run.execute("forward")
    assert run.recording.finished == ["forward"]
    first, second = run.recording.times()
    # Stage 0 computes 5, stage 1 waits for it, computes 2, and so on.
    assert [(t.function, t.microbatch) for t in first] == [("forward_0", 0), ("forward_0", 1)]
    start = RecordedTimes("forward_1", 0, 0.0, 7.0, ((0.0, 5.0),), 5.0, None)
    assert second == [start, RecordedTimes("forward_1", 1, 7.0, 14.0, ((7.0, 12.0),), 12.0, None)]
    assert [t.sent for t in first] == [5.0, 12.0]
    assert all(start == end for t in first for start, end in t.waits)  # its queue has space
    assert names == untouched
    assert names["device_0_forward"].__globals__ is names


def test_a_wait_for_space_in_a_queue_is_no_computing(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()
    reserve = Mailbox.reserve

    def reserving(self: Mailbox, key: Key, capacity: int) -> None:
        if key[2] == 1:
            full.set()
        reserve(self, key, capacity)

    take = Mailbox.take

    def taking(self: Mailbox, key: Key) -> Any:
        if key[2] == 0:
            assert full.wait(LIMIT)  # stage 0 waits for the slot of its first message
            clock.now += 3
        return take(self, key)

    monkeypatch.setattr(Mailbox, "reserve", reserving)
    monkeypatch.setattr(Mailbox, "take", taking)
    run, _ = recorded(lambda m: torch.ones(1), lambda m, value: None, slots=1)
    run.execute("forward")
    (_, last), _ = run.recording.times()
    assert last == RecordedTimes("forward_0", 1, 0.0, 3.0, ((0.0, 3.0),), None, 3.0)


def test_a_run_that_fails_is_not_finished(clock: HandClock) -> None:
    def one(m: int, value: torch.Tensor) -> None:
        raise ValueError("no")

    run, _ = recorded(lambda m: torch.ones(1), one)
    with pytest.raises(StageError, match="stage 1, micro-batch 0 failed"):
        run.execute("forward")
    assert run.recording.finished == []
