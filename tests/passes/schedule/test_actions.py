"""Schedules as data: printing, what stays in flight, and invalid schedules."""

from __future__ import annotations

import dataclasses

import pytest

from autopipe.errors import VerifyError
from autopipe.passes.schedule.actions import Action, Scheduled
from autopipe.passes.schedule.build import schedule


def row(text: str) -> tuple[Action, ...]:
    """'F0.1 RBW0.1' as actions."""
    actions = []
    for word in text.split():
        stage, microbatch = word.lstrip("FRBW").split(".")
        actions.append(Action(word.rstrip("0123456789."), int(stage), int(microbatch)))
    return tuple(actions)


def test_actions_print_and_sort() -> None:
    assert [str(a) for a in row("F2.0 RBW2.0")] == ["F2.0", "RBW2.0"]
    assert sorted(row("RBW0.0 F1.0 F0.1 F0.0")) == list(row("F0.0 F0.1 F1.0 RBW0.0"))


def test_a_schedule_prints_as_a_table() -> None:
    assert str(schedule("1f1b", 2, 2)).splitlines() == [
        "1f1b: 2 stages, 2 micro-batches",
        "device 0   F0.0   F0.1   RBW0.0 RBW0.1",
        "device 1   F1.0   RBW1.0 F1.1   RBW1.1",
    ]


def test_a_backward_may_be_cut_into_its_phases_and_its_weights_put_off() -> None:
    late = Scheduled("late", 2, 1, (row("F0.0 R0.0 B0.0 W0.0"), row("F1.0 RB1.0 W1.0")))
    late.verify()
    assert late.in_flight() == (1, 1)
    order = [str(action) for _, action in late.execution_order()]
    assert order.index("R0.0") < order.index("F1.0") < order.index("RB1.0") < order.index("B0.0")


def test_one_device_may_hold_several_stages() -> None:
    both = Scheduled("both", 2, 1, (row("F0.0 F1.0 RBW1.0 RBW0.0"),))
    both.verify()
    assert both.in_flight() == (1, 1)


def test_what_a_device_keeps_is_counted_over_its_stages() -> None:
    """Its two stages have their peaks at different times: 2 + 1 at most, not 2 + 2."""
    rows = (row("F0.0 F0.1 F1.0 RBW1.0 RBW0.0 F1.1 RBW1.1 RBW0.1"),)
    both = Scheduled("both", 2, 2, rows)
    both.verify()
    assert (both.in_flight(), both.device_in_flight()) == ((2, 1), (3,))
    assert Scheduled("forward", 2, 1, (row("F0.0"), row("F1.0"))).device_in_flight() == (0, 0)
    for kind in ("gpipe", "1f1b", "zb-h2"):
        assert schedule(kind, 3, 7).device_in_flight() == schedule(kind, 3, 7).in_flight()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("F0.0 RBW0.0", "F1.0"), "B1.0 is not scheduled|R1.0 is not scheduled"),
        (("F0.0 RBW0.0", "RBW1.0"), "F1.0 is not scheduled"),
        (("F0.0 RBW0.0",), "F1.0 is not scheduled"),
        (("F0.0 RBW0.0", "F1.0 RB1.0"), "W1.0 is not scheduled"),
        (("F0.0 F0.0 RBW0.0", "F1.0 RBW1.0"), "F0.0 on device 0 repeats F0.0"),
        (("F0.0 RBW0.0", "F1.0 RBW1.0 W1.0"), "W1.0 on device 1 repeats W1.0"),
        (("F0.0 RBW0.0", "F1.0 RBW1.0 F0.0"), "F0.0 on device 1: a stage must be on one device"),
        (("F0.0 RBW0.0", "F1.0 RBW1.0 F1.1"), "F1.1 on device 1 is out of range"),
        (("F0.0 RBW0.0 F2.0", "F1.0 RBW1.0"), "F2.0 on device 0 is out of range"),
        (("F0.0 RW0.0", "F1.0 RBW1.0"), "RW0.0 on device 0 has an unknown phase"),
        (("F0.0 FRBW0.0", "F1.0 RBW1.0"), "FRBW0.0 on device 0 has an unknown phase"),
        (("RBW0.0 F0.0", "F1.0 RBW1.0"), "device 0 can never run RBW0.0"),
        (("F0.0 RBW0.0", "RBW1.0 F1.0"), "device 0 can never run RBW0.0"),
    ],
)
def test_schedules_that_are_wrong_are_caught(rows: tuple[str, ...], message: str) -> None:
    wrong = Scheduled("wrong", 2, 1, tuple(map(row, rows)))
    with pytest.raises(VerifyError, match=message):
        wrong.verify()


@pytest.mark.parametrize("phases", [("F", "RBW"), ("F", "RB", "W")])
def test_gradients_out_of_the_order_of_micro_batches_are_caught(phases: tuple[str, ...]) -> None:
    """Forwards may run in any order: nothing is added up there."""
    forward, *backward = phases
    actions = [Action(forward, 0, 1), Action(forward, 0, 0)]
    sound = [Action(phase, 0, m) for phase in backward for m in (0, 1)]
    Scheduled("sound", 1, 2, ((*actions, *sound),)).verify()
    last = f"{backward[-1]}0.1"
    sound[-2:] = reversed(sound[-2:])
    with pytest.raises(VerifyError, match=f"{last} on device 0 is out of order") as caught:
        Scheduled("wrong", 1, 2, ((*actions, *sound),)).verify()
    assert caught.value.found == "1, 0"


def test_an_empty_phase_is_caught() -> None:
    wrong = Scheduled("wrong", 1, 1, ((Action("", 0, 0), Action("F", 0, 0)),))
    with pytest.raises(VerifyError, match="unknown phase"):
        wrong.verify()


def test_a_deadlock_names_every_device_that_waits() -> None:
    wrong = Scheduled("wrong", 2, 2, (row("F0.0 F0.1"), row("F1.1 F1.0")))
    wrong.verify()  # an odd order, but no deadlock: nothing waits for device 1
    swapped = (row("F0.0 RBW0.0 F0.1 RBW0.1"), row("F1.0 F1.1 RBW1.0 RBW1.1"))
    with pytest.raises(VerifyError, match=r"device 0 can never run RBW0\.0") as caught:
        dataclasses.replace(wrong, devices=swapped).verify()
    assert caught.value.expected == "before it: F0.0, B1.0"
    assert caught.value.found == "device 0 waits at RBW0.0; device 1 waits at F1.1"
