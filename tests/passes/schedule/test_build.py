"""Building schedules of every kind: rematerialization, inference and refused options.

Covers schedule/schedule_kind.py, schedule/device_schedule.py.
"""

from __future__ import annotations

import itertools

import pytest

from autopipe.errors import OptionError
from autopipe.passes.schedule.actions import Action
from autopipe.passes.schedule.build import schedule, schedule_for
from autopipe.passes.schedule.kinds import DEFAULT_KIND, KINDS

SIZES = [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (3, 7), (8, 24)]
EVERY = [(kind, None) for kind in KINDS] + [("interleaved", 1), ("interleaved", 3)]


def row(text: str) -> tuple[Action, ...]:
    """'F0.1 RBW0.1' as actions."""
    actions = []
    for word in text.split():
        stage, microbatch = word.lstrip("FRBW").split(".")
        actions.append(Action(word.rstrip("0123456789."), int(stage), int(microbatch)))
    return tuple(actions)


@pytest.mark.parametrize(("stages", "chunks"), SIZES)
@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_schedules_verify_and_run_backward_in_order(kind: str, stages: int, chunks: int) -> None:
    made = schedule(kind, stages, chunks)
    made.verify()
    for actions in made.devices:
        for phase in ("F", "RBW"):
            order = [action.microbatch for action in actions if action.phase == phase]
            assert order == list(range(chunks))


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_inference_has_forwards_only_and_keeps_nothing(kind: str) -> None:
    made = schedule(kind, 2, 2, backward=False)
    made.verify()
    assert made.devices == (row("F0.0 F0.1"), row("F1.0 F1.1"))
    assert made.in_flight() == (0, 0)


@pytest.mark.parametrize(
    ("kind", "virtual_stages"),
    [("gpipe", 2), ("1f1b", 2), ("zb-h1", 0), ("zb-h2", 3), ("zb-v", 1), ("interleaved", 0)],
)
def test_stages_per_device_that_a_kind_does_not_have_are_refused(
    kind: str, virtual_stages: int
) -> None:
    with pytest.raises(OptionError, match="`virtual_stages`"):
        schedule(kind, 2, 2, virtual_stages=virtual_stages)


def test_unknown_kinds_list_the_known() -> None:
    with pytest.raises(OptionError, match="unknown schedule") as caught:
        schedule("gpip", 2, 2)
    assert caught.value.expected is not None
    assert all(f"'{kind}'" in caught.value.expected for kind in KINDS)


def test_the_default_kind_is_named() -> None:
    assert DEFAULT_KIND == "gpipe"
    assert DEFAULT_KIND in KINDS


@pytest.mark.parametrize(
    ("stages", "chunks", "name"), [(0, 1, "stages"), (1, 0, "chunks"), (-1, 1, "stages")]
)
def test_counts_below_one_are_refused(stages: int, chunks: int, name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} >= 1"):
        schedule("gpipe", stages, chunks)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("kind", "v"), EVERY)
def test_every_schedule_up_to_eight_stages_and_twenty_micro_batches_verifies(
    kind: str, v: int | None, early: bool
) -> None:
    """No deadlock, every action once, and per stage each phase in the order of micro-batches."""
    backward = sorted({letters for letters, _, _ in KINDS[kind].order(1, 1, 1)[0]} - {"F"})
    backward[:1] = ["R", backward[0]] if early else ["R" + backward[0]]
    for K, M in itertools.product(range(1, 9), range(1, 21)):
        made = schedule(kind, K, M, virtual_stages=v, early_recompute=early)
        made.verify()
        assert len(made.devices) == K
        for device in made.devices:
            for stage in {action.stage for action in device}:
                visits = [action for action in device if action.stage == stage]
                assert sorted({action.phase for action in visits}) == sorted(["F", *backward])
                for phase in ("F", *backward):
                    assert [a.microbatch for a in visits if a.phase == phase] == [*range(M)]


@pytest.mark.parametrize(("kind", "v"), EVERY)
def test_inference_is_the_forwards_of_the_same_schedule(kind: str, v: int | None) -> None:
    for K, M in [(1, 1), (3, 5), (4, 2)]:
        whole = schedule(kind, K, M, virtual_stages=v)
        made = schedule(kind, K, M, virtual_stages=v, backward=False, early_recompute=True)
        made.verify()
        assert made.devices == tuple(
            tuple(action for action in row if action.phase == "F") for row in whole.devices
        )


def test_stages_are_placed_as_the_order_says() -> None:
    assert schedule_for("1f1b", 3).homes == (0, 1, 2)
    assert schedule_for("interleaved", 2, 3).homes == (0, 1, 0, 1, 0, 1)
    assert schedule_for("zb-v", 3).homes == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize(("kind", "v"), EVERY)
def test_a_stage_is_on_one_device_for_any_number_of_micro_batches(kind: str, v: int | None) -> None:
    for K in (1, 2, 3, 5):
        placed = schedule_for(kind, K, v)
        assert sorted(set(placed.homes)) == list(range(K))
        for M in (1, 2, 7, 12):
            for device, row in enumerate(placed.scheduled(M).devices):
                assert {placed.homes[a.stage] for a in row} == {device}


def test_r_is_early_where_the_gradient_comes_from_another_device() -> None:
    placed = schedule_for("zb-v", 2)  # device 0 has stages 0 and 3, device 1 has 1 and 2
    assert placed.waiting([True] * 4) == (0, 2)
    assert placed.waiting([False, True, True, True]) == (2,)
    rows = placed.scheduled(2, early_recompute=[0]).devices
    phases = {(a.stage, a.phase) for row in rows for a in row}
    assert phases == {(0, x) for x in ("F", "R", "B", "W")} | {
        (k, x) for k in (1, 2, 3) for x in ("F", "RB", "W")
    }
