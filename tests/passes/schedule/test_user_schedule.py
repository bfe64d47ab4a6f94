"""Users' schedules: what is accepted, and every way to be wrong; drawn valid and broken ones."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autopipe.errors import OptionError, VerifyError
from autopipe.passes.schedule import (
    KINDS,
    Action,
    Queue,
    Scheduled,
    StageMessages,
    queue_sizes,
    schedule,
    scheduled_from_lists,
    simulate_actions,
)
from tests.support.random_schedules import Rows, valid_schedules

# ------------------------------------------------------------------------------ how users write


def test_texts_tuples_and_actions_are_the_same() -> None:
    expected = schedule("zb-h1", 3, 5)
    texts = [[str(action) for action in row] for row in expected.devices]
    tuples = [[(a.phase, a.stage, a.microbatch) for a in row] for row in expected.devices]
    for rows in (texts, tuples, [list(row) for row in expected.devices], expected.devices):
        assert scheduled_from_lists("zb-h1", rows) == expected
    assert scheduled_from_lists("x", [[" F0.0 ", ["BW", 0, 0]]]).devices == (  # type: ignore[list-item]
        (Action("F", 0, 0), Action("RBW", 0, 0)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_b_gets_its_r_if_there_is_none(kind: str) -> None:
    for K, M in [(1, 1), (3, 4)]:
        order = KINDS[kind].order(K, M, KINDS[kind].virtual_stages)
        assert scheduled_from_lists(kind, order) == schedule(kind, K, M)


def test_letters_are_taken_as_they_are_where_there_is_an_r() -> None:
    found = scheduled_from_lists("own", [["F0.0", "R0.0", "F1.0", "RB1.0", "W1.0", "B0.0", "W0.0"]])
    assert [a.phase for a in found.devices[0]] == ["F", "R", "F", "RB", "W", "B", "W"]
    with pytest.raises(OptionError, match=r"R1\.0 is not scheduled on device 0"):
        scheduled_from_lists("own", [["F0.0", "F1.0", "BW1.0", "RBW0.0"]])


def test_forwards_alone_are_a_schedule_for_inference() -> None:
    assert scheduled_from_lists("own", [["F1.0", "F1.1"], ["F0.0", "F0.1"]]) == Scheduled(
        "own",
        2,
        2,
        (
            (Action("F", 1, 0), Action("F", 1, 1)),
            (Action("F", 0, 0), Action("F", 0, 1)),
        ),
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "a list with a list of actions for each device"),
        ("F0.0", "a list with a list of actions for each device"),
        ({0: ["F0.0"]}, "a list with a list of actions for each device"),
        (["F0.0 BW0.0"], "device 0\n  expected: a list of actions\n  found: 'F0.0 BW0.0'"),
        ([["F0.0", "BW0.0"], None], "device 1\n  expected: a list of actions"),
        ([["F0.0", "BW0.0"], []], "device 1 runs nothing"),
        ([["F0.0", 3]], "entry 1 of device 0"),
        ([["F0.0", "BW0"]], "entry 1 of device 0\n  expected: an action"),
        ([["F0.0", ("BW", 0)]], "entry 1 of device 0\n  expected: an action"),
        ([["F0.0", "F0.-1"]], "entry 1 of device 0\n  expected: an action"),
        ([["F0.0", "WB0.0"]], "entry 1 of device 0: unknown letters"),
        ([["F0.0", "bw0.0"]], "entry 1 of device 0: unknown letters"),
        ([["F0.0", ("X", 0, 0)]], "entry 1 of device 0: unknown letters"),
        ([["F0.0", (["B"], 0, 0)]], "entry 1 of device 0: unknown letters"),
        ([["F0.0", ("BW", 0.0, 0)]], "entry 1 of device 0: stage"),
        ([["F0.0", ("BW", False, 0)]], "entry 1 of device 0: stage"),
        ([["F0.0", Action("BW", 0, -1)]], "entry 1 of device 0: micro-batch"),
        ([["F0.0", "BW0.0"], ["F2.0", "BW2.0"]], "F2.0 on device 1, but nothing runs stage 1"),
        ([["F0.1", "BW0.1"]], "F0.1 on device 0, but nothing runs micro-batch 0"),
        ([[("F", 10**12, 0)]], "F1000000000000.0 on device 0, but nothing runs stage 0"),
        ([["F0.0", "BW0.0", "W0.0"]], "W0.0 on device 0 repeats W0.0"),
        ([["F0.0", "B0.0"]], "W0.0 is not scheduled on device 0"),
        ([["F0.0", "BW0.0"], ["F0.1", "BW0.1"]], "F0.1 on device 1: a stage must be on one"),
        ([["BW0.0", "F0.0"]], "device 0 can never run RBW0.0"),
        ([["F0.0", "W0.0", "B0.0"]], "device 0 can never run W0.0"),
        ([["F0.0", "B0.0", "R0.0", "W0.0"]], "device 0 can never run B0.0"),
        ([["F0.0", "F0.1", "BW0.1", "BW0.0"]], "RBW0.1 on device 0 is out of order"),
        ([["F0.1", "F0.0", "BW0.0", "BW0.1"]], "F0.1 on device 0 is out of order"),
    ],
)
def test_what_is_refused_and_how(rows: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        scheduled_from_lists("own", rows)
    assert str(caught.value).startswith("schedule 'own'")
    assert message in str(caught.value)


def test_a_name_is_a_text() -> None:
    with pytest.raises(OptionError, match="the name of a schedule"):
        scheduled_from_lists(3, [["F0.0"]])  # type: ignore[arg-type]


def test_forwards_out_of_order_are_no_error_of_a_schedule_by_itself() -> None:
    """`verify` accepts them: only generated code needs their order."""
    row = (Action("F", 0, 1), Action("F", 0, 0))
    Scheduled("own", 1, 2, (row,)).verify()
    with pytest.raises(OptionError, match=r"F0\.1 on device 0 is out of order"):
        scheduled_from_lists("own", [row])


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["F0.0", "BW0.0", "B1.0", "F1.0", "W0.0", "R0.0", "F0.99999999"])
    | st.builds(Action, st.sampled_from(["F", "BW", "", "X"]), st.integers(-1, 2), st.just(0)),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner, inner),
    max_leaves=12,
)  # fmt: skip


@given(junk)
def test_nothing_but_a_schedule_or_an_option_error_comes_out(rows: Any) -> None:
    with suppress(OptionError):
        scheduled_from_lists("drawn", rows).verify()


# --------------------------------------------------------------------- valid schedules at random


def _messages(stages: int) -> list[StageMessages]:
    """Each stage sends to the next one, and gradients back."""
    down = [Queue("x", k, k + 1) for k in range(stages - 1)]
    up = [Queue("grad x", k + 1, k) for k in range(stages - 1)]
    return [
        StageMessages(
            received={"F": down[max(k - 1, 0) : k], "B": up[k : k + 1]},
            sent={"F": down[k : k + 1], "B": up[max(k - 1, 0) : k]},
        )
        for k in range(stages)
    ]


@given(valid_schedules())
def test_any_valid_schedule_is_accepted_and_runs_to_its_end(
    drawn: tuple[Scheduled, random.Random],
) -> None:
    made, _ = drawn
    made.verify()
    assert scheduled_from_lists("drawn", made.devices) == made
    sizes = queue_sizes(made, _messages(made.stages), lambda source, to: 1)
    assert all(1 <= size <= made.chunks for size in sizes.values())
    timeline = simulate_actions(made, lambda phase, k, m: len(phase), lambda *_: 0.0)
    timeline.verify(made)
    for peak, row in zip(made.device_in_flight(), made.devices, strict=True):
        of_stages = [made.in_flight()[k] for k in {a.stage for a in row}]
        assert max(of_stages) <= peak <= sum(of_stages)


# -------------------------------------------------------------------------- broken ones at random


def _at(rows: Rows, rng: random.Random, letter: str = "") -> tuple[int, int]:
    """The place of some action, of one with that letter."""
    places = [(d, i) for d, row in enumerate(rows) for i, a in enumerate(row) if letter in a.phase]
    return rng.choice(places)


def _same(rows: Rows, of: Action, letter: str) -> tuple[int, int]:
    """The place of a phase of the same micro-batch at the same stage."""
    return next(
        (d, i)
        for d, row in enumerate(rows)
        for i, a in enumerate(row)
        if letter in a.phase and (a.stage, a.microbatch) == (of.stage, of.microbatch)
    )


def missing(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng)
    assume(len(rows[d]) > 1)
    del rows[d][i]
    assume(any("R" in a.phase for row in rows for a in row))


def repeated(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng)
    rows[d].insert(rng.randint(i, len(rows[d])), rows[d][i])


def unknown_phase(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng)
    rows[d][i] = replace(rows[d][i], phase=rng.choice(["", "f", "FB", "WB", "RW", "X", "FRBW"]))


def two_devices(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng)
    assume(len(rows[d]) > 1)
    rows[d - 1].insert(rng.randint(0, len(rows[d - 1])), rows[d].pop(i))
    assume(all(rows))


def no_such_stage(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng)
    stages = len({a.stage for row in rows for a in row})
    rows[d][i] = replace(rows[d][i], stage=rng.choice([-1, stages, 10**15]))


def no_such_micro_batch(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng)
    chunks = len({a.microbatch for row in rows for a in row})
    rows[d][i] = replace(rows[d][i], microbatch=rng.choice([-1, chunks, 10**15]))


def backward_before_forward(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng, "F")
    backward = rows[d].pop(_same(rows, rows[d][i], "B")[1])
    rows[d].insert(i, backward)


def weights_before_inputs(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng, "B")
    action = rows[d][i]
    if "W" in action.phase:
        rows[d][i : i + 1] = [replace(action, phase="W"), replace(action, phase=action.phase[:-1])]
    else:
        weight = rows[d].pop(_same(rows, action, "W")[1])
        rows[d].insert(i, weight)


def remat_after_backward(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng, "R")
    action = rows[d].pop(i)
    if action.phase == "R":
        i = _same(rows, action, "B")[1] + 1
        rows[d].insert(i, action)
    else:
        rows[d][i:i] = [replace(action, phase=action.phase[1:]), replace(action, phase="R")]


def deadlock(rows: Rows, rng: random.Random) -> None:
    """F s.1 waits for B s.0, so for B s+1.0, which waits for F s+1.1, so for F s.1."""
    home = {a.stage: d for d, row in enumerate(rows) for a in row}
    stage = rng.choice([s for s in home if home.get(s + 1, home[s]) != home[s]])
    for k, first, last in ((stage, "B", "F"), (stage + 1, "F", "B")):
        row = rows[home[k]]
        two = Action(last, k, 1) if last == "F" else None
        moved = two or next(a for a in row if "B" in a.phase and (a.stage, a.microbatch) == (k, 0))
        row.remove(moved)
        other = 0 if first == "B" else 1
        _, i = _same(rows, Action("", k, other), first)
        row.insert(i + 1, moved)


def gradients_out_of_order(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng, rng.choice("BW"))
    same = [
        j
        for j, a in enumerate(rows[d])
        if j != i and (a.phase, a.stage) == (rows[d][i].phase, rows[d][i].stage)
    ]
    assume(same)
    j = rng.choice(same)
    rows[d][i], rows[d][j] = rows[d][j], rows[d][i]


def empty_device(rows: Rows, rng: random.Random) -> None:
    rows.insert(rng.randint(0, len(rows)), [])


def no_backward(rows: Rows, rng: random.Random) -> None:
    stages = {a.stage for row in rows for a in row}
    stage = rng.choice(sorted(stages))
    assume(len(stages) > 1)
    rows[:] = [[a for a in row if a.stage != stage or a.phase == "F"] for row in rows]


def no_row(rows: Rows, rng: random.Random) -> None:
    rows[rng.randrange(len(rows))] = rng.choice(["F0.0", None, 3, {}])  # type: ignore[call-overload]


def no_action(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng)
    rows[d][i] = rng.choice([None, 3, ("F", 0), ["F", 0, 0, 0], "F0"])  # type: ignore[call-overload]


def no_index(rows: Rows, rng: random.Random) -> None:
    d, i = _at(rows, rng)
    wrong = rng.choice([None, 0.0, True, "0"])
    rows[d][i] = replace(rows[d][i], **{rng.choice(["stage", "microbatch"]): wrong})


BREAKS: dict[Callable[[Rows, random.Random], None], tuple[str, int, int]] = {
    # what the message of `verify` says, and the devices and micro-batches that it takes
    missing: (r"is not scheduled on device \d", 1, 1),
    repeated: (r"on device \d repeats", 1, 1),
    unknown_phase: (r"on device \d has an unknown phase", 1, 1),
    two_devices: (r"on device \d: a stage must be on one device", 2, 1),
    no_such_stage: (r"on device \d is out of range", 1, 1),
    no_such_micro_batch: (r"on device \d is out of range", 1, 1),
    backward_before_forward: (r"can never run|on device \d is out of order", 1, 1),
    weights_before_inputs: (r"can never run|on device \d is out of order", 1, 1),
    remat_after_backward: (r"device \d can never run", 1, 1),
    deadlock: (r"device \d can never run|on device \d is out of order", 2, 2),
    gradients_out_of_order: (r"on device \d is out of order", 1, 2),
    empty_device: (r"device \d runs nothing", 1, 1),
    no_backward: (r"[RBW]\d\.\d is not scheduled on device \d", 1, 1),
    no_row: (r"device \d", 1, 1),
    no_action: (r"entry of device \d", 1, 1),
    no_index: (r"on device \d", 1, 1),
}


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.__name__)
@given(data=st.data())
def test_every_way_to_break_a_schedule_is_refused(
    broken: Callable[[Rows, random.Random], None], data: st.DataObject
) -> None:
    """By `verify`, and by what reads users' lists; both name the device and, if any, the action."""
    message, devices, chunks = BREAKS[broken]
    made, rng = data.draw(valid_schedules(devices, chunks))
    rows: Rows = [list(row) for row in made.devices]
    broken(rows, rng)
    as_tuples = tuple(tuple(row) if isinstance(row, list) else row for row in rows)
    with pytest.raises(VerifyError) as caught:
        replace(made, devices=as_tuples).verify()
    assert re.search(message, str(caught.value)), str(caught.value)
    with pytest.raises(OptionError, match=r"schedule 'drawn'.*device \d"):
        scheduled_from_lists("drawn", rows)


@pytest.mark.parametrize(("stages", "chunks"), [(0, 1), (1, 0), (1.0, 1), (True, 1), (1, None)])
def test_counts_that_are_none(stages: Any, chunks: Any) -> None:
    with pytest.raises(VerifyError, match=r"the number of (stages|micro-batches)"):
        Scheduled("own", stages, chunks, ((Action("F", 0, 0),),)).verify()


def test_a_stage_without_backward_is_named_by_what_its_user_left_out() -> None:
    """Who writes no R is not told of a missing R."""
    with pytest.raises(OptionError, match=r"B1\.0 is not scheduled on device 1"):
        scheduled_from_lists("mine", [["F0.0", "BW0.0"], ["F1.0"]])
