"""`pipe.profile()` and `pipe.timeline()`: what is measured of real steps, and what is left out.

Covers inspection.py. Times are compared with one another, never with a clock.
"""

from __future__ import annotations

import copy
import pickle
import threading
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import OptionError, StageError, UnsupportedError
from autopipe.passes.schedule.timeline import Timeline
from autopipe.runtime.backends import BACKENDS
from tests.support.recording import RecordingBackend

pytestmark = pytest.mark.usefixtures("alike_models_once")

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.layers(x), y)


def piped(schedule: str = "gpipe", devices: int = 2, chunks: int = 4) -> autopipe.Pipeline:
    return autopipe.compile(Scored(), ["cpu"] * devices, chunks, schedule=schedule)  # type: ignore[arg-type]


def check(line: Timeline, measured: autopipe.Measured) -> None:
    """Complete, in the schedule's order, one at a time, after what each action needs."""
    scheduled = measured.found.scheduled
    line.verify(scheduled)
    rows = [[span.action for span in row] for row in line.spans]
    assert rows == [list(row) for row in scheduled.devices]
    assert min(row[0].start for row in line.spans) == 0
    assert max(row[-1].end for row in line.spans) == line.makespan
    for row in line.spans:
        for span in row:
            inside = [span.start, *(t for wait in span.waits for t in wait), span.end]
            assert inside == sorted(inside)
            assert 0 <= span.busy <= span.end - span.start
        for one, two in pairwise(row):
            assert one.end <= two.start
    assert 0 <= line.bubble < 1


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_every_action_of_a_step_is_measured(schedule: str, devices: int) -> None:
    pipe = piped(schedule, devices)
    with pipe.profile() as measured:
        for _ in range(3):
            pipe(X, Y).backward()
    assert (len(measured.steps), measured.others, measured.unfinished) == (3, 0, 0)
    for line in measured.steps:
        check(line, measured)
        early = schedule != "gpipe"
        assert (line.pause is None) == early
        if line.pause is not None:
            ends = [s.end for row in line.spans for s in row if s.action.phase == "F"]
            assert line.pause[0] == max(ends)
    split = schedule == "zb-h1"
    waiting = {"F", "R", "B", "W"} if split else {"F", "R", "BW"}  # for a gradient, after R
    last = {"F", "RB", "W"} if split else {"F", "RBW"}
    found = [set(stage) for stage in measured.phase_seconds]
    assert found == [waiting] * (devices - 1) + [last]
    assert all(t > 0 for stage in measured.phase_seconds for t in stage.values())
    measured.simulated.verify(measured.found.scheduled)
    assert measured.predicted.makespan > 0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_inference_is_measured(schedule: str) -> None:
    pipe = piped(schedule)
    with torch.no_grad(), pipe.profile() as measured:
        pipe(X, Y)
        pipe(X, Y)
    assert len(measured.steps) == 2
    assert [set(stage) for stage in measured.phase_seconds] == [{"F"}] * 2
    for line in measured.steps:
        check(line, measured)
        assert line.pause is None


def test_results_are_those_without_a_profile() -> None:
    one, two = piped("1f1b"), piped("1f1b")
    loss = one(X, Y)
    loss.backward()
    with two.profile():
        measured = two(X, Y)
        measured.backward()
    assert torch.equal(loss, measured)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_what_runs_without_a_profile_is_what_was_generated() -> None:
    pipe = piped()
    pipe(X, Y).backward()
    program = pipe._programs.last[1].program
    names = program.forward[0].__globals__
    before = dict(names)
    with pipe.profile() as measured:
        pipe(X, Y).backward()
    assert measured.steps
    assert names == before
    assert all(f.__globals__ is names for f in (*program.forward, *program.backward))


def test_what_is_no_whole_step_is_left_out() -> None:
    pipe = piped()
    with pipe.profile() as measured:
        late = pipe(X, Y)
        for _ in range(2):
            pipe(X, Y).backward()
        pipe(X[:4], Y[:4]).backward()  # another program
        with torch.no_grad():
            pipe(X, Y)
    late.backward()  # works, but is not measured
    assert (len(measured.steps), measured.others, measured.unfinished) == (2, 2, 1)
    assert "2 steps of other programs" in str(measured)
    assert "1 call without a whole backward" in str(measured)


def test_an_exception_ends_the_profile_and_passes() -> None:
    pipe = piped()
    caught = None
    try:
        with pipe.profile() as measured:
            pipe(X, Y).backward()
            raise ZeroDivisionError
    except ZeroDivisionError as error:
        caught = error
    assert caught is not None
    assert len(measured.steps) == 1
    with pipe.profile() as again:
        with pytest.raises(StageError):
            pipe(X, Y + 7)
        pipe(X, Y).backward()
    assert (len(again.steps), again.unfinished) == (1, 1)


def test_one_profile_at_a_time_of_a_pipeline() -> None:
    one, two = piped(), piped("1f1b")
    with one.profile() as first, two.profile() as second:
        with pytest.raises(UnsupportedError, match="open already"), one.profile():
            pass
        one(X, Y).backward()
        two(X, Y).backward()
        two(X, Y).backward()
    assert (len(first.steps), len(second.steps)) == (1, 2)
    with one.profile() as third:
        pass
    assert third.steps == ()
    with pytest.raises(OptionError, match="no step was measured"):
        _ = third.timeline
    assert one.timeline().measured == first.timeline  # the last one that measured something


def test_calls_of_all_threads_count() -> None:
    pipe = piped()
    pipe(X, Y).backward()
    failures = []

    def work() -> None:
        try:
            with torch.no_grad():
                pipe(X, Y)
        except BaseException as error:
            failures.append(error)

    with pipe.profile() as measured:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(measured.steps) == 3
    for line in measured.steps:
        check(line, measured)


def test_a_device_with_streams_is_marked_in_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = set()

    class Marking(RecordingBackend):
        def mark(self, stream: object) -> object:
            marked.add(stream.name)  # type: ignore[attr-defined]
            return super().mark(stream)  # type: ignore[arg-type]

    monkeypatch.setitem(BACKENDS, "cpu", Marking())
    pipe = piped("1f1b")
    with pipe.profile() as measured:
        pipe(X, Y).backward()
    assert marked == {"stream 0", "stream 1"}  # those that the workers compute on
    assert len(measured.steps) == 1


def test_copies_of_a_pipeline_have_no_profile() -> None:
    pipe = piped()
    with pipe.profile() as measured:
        other = copy.deepcopy(pipe)
        other(X, Y).backward()
        pickle.loads(pickle.dumps(pipe))
    assert measured.steps == ()


def test_before_anything_is_measured_a_timeline_is_predicted() -> None:
    pipe = piped()
    with pytest.raises(OptionError, match="nothing has been compiled"):
        pipe.timeline()
    pipe.capture(X, Y)
    lines = pipe.timeline()
    assert lines.measured is None
    assert lines.simulated is None
    assert lines.predicted == pipe.plan.timeline
    assert "with pipe.profile() as measured" in str(lines)
    with pipe.profile() as measured:
        pipe(X, Y).backward()
    assert pipe.timeline().measured == measured.timeline
    assert list(pipe.timeline().timelines) == ["measured", "predicted", "simulated"]
