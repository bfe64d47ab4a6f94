"""A user's function, or a `Scheduled`, as a kind of schedule."""

from __future__ import annotations

import pickle

import pytest

from autopipe.errors import OptionError
from autopipe.passes.schedule import schedule, schedule_for
from autopipe.passes.schedule.user_kind import is_own, schedule_of_function, schedule_of_rows


def in_turn(K: int, M: int) -> list[list[str]]:
    """Each micro-batch forward and backward before the next."""
    return [[f"{x}{k}.{m}" for m in range(M) for x in ("F", "BW")] for k in range(K)]


def two_each(K: int, M: int) -> list[list[tuple[str, int, int]]]:
    """GPipe with two stages on each device, one after the other."""
    rows = []
    for k in range(K):
        turns = (("F", 2 * k), ("F", 2 * k + 1), ("BW", 2 * k + 1), ("BW", 2 * k))
        rows.append([(letters, stage, m) for letters, stage in turns for m in range(M)])
    return rows


def placed_r(K: int, M: int) -> list[list[str]]:
    """R of all micro-batches before the first B."""
    letters = ("F", "R", "BW")
    return [[f"{x}{k}.{m}" for x in letters for m in range(M)] for k in range(K)]


def moving(K: int, M: int) -> list[list[str]]:
    """The two devices change places if M is odd."""
    return in_turn(K, M)[:: -1 if M % 2 else 1]


def broken(K: int, M: int) -> list[list[str]]:
    raise RuntimeError("no such M")


def test_a_function_gives_the_order() -> None:
    own = schedule_of_function(in_turn, 2, 3)
    assert (own.name, own.homes, own.stages) == ("in_turn", (0, 1), 2)
    assert not own.kind.forwards_first
    assert is_own(own.kind)
    assert not is_own(schedule_for("1f1b", 2).kind)
    found = own.scheduled(2)
    found.verify()
    assert [str(a) for a in found.devices[1]] == ["F1.0", "RBW1.0", "F1.1", "RBW1.1"]
    early = own.scheduled(1, early_recompute=[0])
    assert [str(a) for a in early.devices[0]] == ["F0.0", "R0.0", "BW0.0"]
    assert [str(a) for a in own.scheduled(1, backward=False).devices[0]] == ["F0.0"]
    assert pickle.loads(pickle.dumps(own)) == own


def test_stages_are_where_the_function_puts_them() -> None:
    own = schedule_of_function(two_each, 3, None)
    assert own.homes == (0, 0, 1, 1, 2, 2)
    assert own.kind.forwards_first
    own.scheduled(5).verify()


def test_r_stays_where_the_user_puts_it() -> None:
    own = schedule_of_function(placed_r, 2, 2)
    found = own.scheduled(2, early_recompute=[0, 1])
    assert [a.phase for a in found.devices[0]] == ["F", "F", "R", "R", "BW", "BW"]


def test_a_schedule_serves_fewer_micro_batches() -> None:
    own = schedule_of_rows(schedule("1f1b", 2, 4))
    assert own.name == "own 1f1b"
    assert own.kind.most_chunks == 4
    for M in (1, 2, 3, 4):
        assert own.scheduled(M).devices == schedule("1f1b", 2, M).devices
    with pytest.raises(OptionError, match="other sizes") as caught:
        own.scheduled(5)
    assert "at most 4 micro-batches" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (broken, "fails"),
        (lambda K, M: in_turn(K + 1, M), "3 devices"),
        (lambda K, M: in_turn(K, M + 1), "4 micro-batches"),
        (lambda K, M: None, "list"),
        (lambda K, M: [["F0.0"], []], "runs nothing"),
        (lambda K, M: in_turn(K, M)[:1] * 2, "must be on one device"),
        (lambda K: [], "fails"),
    ],
)
def test_a_function_that_gives_no_schedule_is_refused(function, problem: str) -> None:
    with pytest.raises(OptionError) as caught:
        schedule_of_function(function, 2, 3)
    assert problem in str(caught.value)


def test_a_stage_may_not_move() -> None:
    own = schedule_of_function(moving, 2, 4)
    own.scheduled(2).verify()
    with pytest.raises(OptionError, match="for 3 micro-batches: stage 1 is on device 0"):
        own.scheduled(3)
