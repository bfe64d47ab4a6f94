"""Measured steps: medians, predictions and texts, by numbers worked out by hand.

Covers planning/measured_data.py, planning/measured_timeline.py and report/measured_text.py.
"""

from __future__ import annotations

import pickle

import pytest

from autopipe.errors import OptionError
from autopipe.passes.schedule.build import schedule
from autopipe.planning.measured import Measured, check_profile
from autopipe.planning.measured_timeline import measured_timeline, waited_transfers
from autopipe.runtime.recording import RecordedTimes
from tests.support.measuring import made_measured
from tests.support.plans import made_plan

TWO = schedule("gpipe", 2, 1)
ROWS = (
    (
        RecordedTimes("forward_0", 0, 100.0, 103.0, (), None, 102.0),
        RecordedTimes("backward_0", 0, 106.0, 114.0, ((106.0, 110.0),), 110.0, None),
    ),
    (
        RecordedTimes("forward_1", 0, 100.5, 105.0, ((101.0, 102.5),), 102.5, None),
        RecordedTimes("backward_1", 0, 106.0, 109.5, (), None, 109.0),
    ),
)
"""A step of one micro-batch: the caller's loss stands from 105 to 106."""


def test_a_recorded_step_becomes_a_timeline() -> None:
    line = measured_timeline(TWO, ROWS, passes=2)
    line.verify(TWO)
    assert [[str(span.action) for span in row] for row in line.spans] == [
        ["F0.0", "RBW0.0"],
        ["F1.0", "RBW1.0"],
    ]
    assert [(s.start, s.end) for s in line.spans[1]] == [(0.5, 5.0), (6.0, 9.5)]
    assert line.makespan == 14.0
    assert line.pause == (5.0, 6.0)
    assert line.busy == (3.0 + 4.0, 3.0 + 3.5)
    assert line.waiting == (4.0, 1.5)
    # Device 0 takes 14, of which 1 is the caller's, and computes 7.
    assert line.bubble == 1 - 7 / 13
    assert measured_timeline(TWO, ROWS, passes=1).pause is None


def test_transfers_are_timed_where_a_device_waited_for_them() -> None:
    line = measured_timeline(TWO, ROWS, passes=2)
    assert dict(waited_transfers(TWO, line)) == {("F", 0, 1): 0.5, ("B", 1, 0): 1.0}
    (f0, b0), (f1, b1) = ROWS
    late = f1._replace(start=102.2, waits=((102.2, 102.3),), arrived=102.3)
    line = measured_timeline(TWO, ((f0, b0), (late, b1)), passes=2)
    assert dict(waited_transfers(TWO, line)) == {("B", 1, 0): 1.0}  # when it arrived is unknown


PLAN = made_plan(2, (4, 4, 3))
STEPS = [
    [{"F": 1.0, "RBW": 3.0}, {"F": 2.0, "RBW": 4.0}],
    [{"F": 1.5, "RBW": 3.0}, {"F": 2.0, "RBW": 5.0}],
    [{"F": 9.0, "RBW": 9.0}, {"F": 9.0, "RBW": 9.0}],
]


def test_medians() -> None:
    measured = made_measured(PLAN, STEPS)
    assert measured.phase_seconds == ({"F": 1.5, "RBW": 3.0}, {"F": 2.0, "RBW": 5.0})
    assert measured.bottleneck == 7.0
    assert measured.timeline is measured.steps[1]
    assert measured.step_seconds == measured.steps[1].makespan
    assert measured.bubble == sorted(line.bubble for line in measured.steps)[1]
    assert measured.pause_seconds == 0
    assert measured.predicted == PLAN.simulated(measured.found.scheduled)
    # All its actions take their median: the step is the second one.
    assert measured.simulated.spans == measured.steps[1].spans
    two = made_measured(PLAN, STEPS[1:])
    assert two.timeline is two.steps[0]


def test_the_text_has_measured_beside_predicted() -> None:
    text = str(made_measured(PLAN, STEPS))
    first, *lines = text.splitlines()
    assert first == (
        "3 steps of Net: 2 stages on 2 devices, 3 micro-batches of 4 or 3, schedule gpipe"
    )
    rows = [line.split() for line in lines]
    assert ["step", "49.5", "ms", "25.5", "s", "25.5", "s"] in rows
    assert ["0", "F", "2", "ms", "1.5", "s", "750.00"] in rows
    assert ["1", "RBW", "10.5", "ms", "5", "s", "476.19"] in rows
    assert text.count("\x1b") == 0
    assert repr(made_measured(PLAN, STEPS[:1])).startswith("Measured(1 step, median 22 s")


def test_nothing_measured_is_an_error_that_says_how() -> None:
    empty = Measured()
    assert empty.steps == ()
    assert repr(empty) == "Measured(no steps)"
    assert "no step was measured" in str(empty)
    for name in ("timeline", "phase_seconds", "bubble", "predicted", "plan", "transfers"):
        with pytest.raises(OptionError, match="no step was measured"):
            getattr(empty, name)
    empty.complete(None, others=0, unfinished=2)
    with pytest.raises(OptionError, match="2 calls without their backward"):
        _ = empty.timeline


def test_it_is_plain_data() -> None:
    measured = made_measured(PLAN, STEPS, earlier=made_measured(PLAN, STEPS[:1]))
    again = pickle.loads(pickle.dumps(measured))
    assert str(again) == str(measured)
    assert again.earlier.steps == measured.steps[:1]


def test_the_option_is_checked() -> None:
    for right in (True, False, made_measured(PLAN, STEPS)):
        check_profile(right)
    with pytest.raises(OptionError, match="`profile`"):
        check_profile("yes")
    with pytest.raises(OptionError, match="no step was measured"):
        check_profile(Measured())
