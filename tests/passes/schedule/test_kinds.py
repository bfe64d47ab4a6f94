"""The order of each kind: small cases written out by hand, and what stays in flight."""

from __future__ import annotations

import itertools

import pytest

from autopipe.passes.schedule.actions import Action
from autopipe.passes.schedule.build import schedule
from autopipe.passes.schedule.kinds import KINDS

SIZES = [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (3, 7), (8, 24)]


def row(text: str) -> tuple[Action, ...]:
    """'F0.1 RBW0.1' as actions."""
    actions = []
    for word in text.split():
        stage, microbatch = word.lstrip("FRBW").split(".")
        actions.append(Action(word.rstrip("0123456789."), int(stage), int(microbatch)))
    return tuple(actions)


def rows(*texts: str) -> tuple[tuple[Action, ...], ...]:
    """'F0.1 RB0.1' as actions, a text per device."""
    found = []
    for text in texts:
        words = [(word.rstrip("0123456789."), word.lstrip("FRBW")) for word in text.split()]
        found.append(tuple(Action(p, *map(int, where.split("."))) for p, where in words))
    return tuple(found)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_bubble_kinds_split_the_backward(kind: str) -> None:
    letters = {letters for letters, _, _ in KINDS[kind].order(2, 3, KINDS[kind].virtual_stages)[0]}
    split = kind in ("zb-h1", "zb-h2", "zb-v", "v-half", "v-min")
    assert letters == ({"F", "B", "W"} if split else {"F", "BW"})


def test_gpipe_runs_all_forwards_then_all_backwards_in_the_same_order() -> None:
    assert schedule("gpipe", 2, 3).devices == (
        row("F0.0 F0.1 F0.2 RBW0.0 RBW0.1 RBW0.2"),
        row("F1.0 F1.1 F1.2 RBW1.0 RBW1.1 RBW1.2"),
    )


def test_1f1b_alternates_once_the_pipeline_is_full() -> None:
    assert schedule("1f1b", 3, 4).devices == (
        row("F0.0 F0.1 F0.2 RBW0.0 F0.3 RBW0.1 RBW0.2 RBW0.3"),
        row("F1.0 F1.1 RBW1.0 F1.2 RBW1.1 F1.3 RBW1.2 RBW1.3"),
        row("F2.0 RBW2.0 F2.1 RBW2.1 F2.2 RBW2.2 F2.3 RBW2.3"),
    )


@pytest.mark.parametrize(("stages", "chunks"), SIZES)
def test_in_flight_is_all_with_gpipe_and_the_depth_with_1f1b(stages: int, chunks: int) -> None:
    assert schedule("gpipe", stages, chunks).in_flight() == (chunks,) * stages
    depth = tuple(min(stages - k, chunks) for k in range(stages))
    assert schedule("1f1b", stages, chunks).in_flight() == depth


@pytest.mark.parametrize(("K", "v"), [(1, 1), (1, 3), (2, 2), (4, 2), (3, 5)])
def test_interleaved_stages_go_round_the_devices(K: int, v: int) -> None:
    made = schedule("interleaved", K, 2 * K, virtual_stages=v)
    assert made.stages == K * v
    for device, row in enumerate(made.devices):
        assert {action.stage for action in row} == set(range(device, K * v, K))


def test_the_stages_of_zb_v_go_down_and_up_again() -> None:
    made = schedule("zb-v", 3, 5)
    homes = [{action.stage for action in row} for row in made.devices]
    assert homes == [{0, 5}, {1, 4}, {2, 3}]


def test_interleaved_with_one_stage_per_device_is_1f1b() -> None:
    for K, M in [(1, 3), (4, 2), (4, 9)]:
        made = schedule("interleaved", K, M, virtual_stages=1)
        assert made.devices == schedule("1f1b", K, M).devices


def test_interleaved_takes_k_micro_batches_through_one_stage_after_another() -> None:
    """Device 1 is 2(K-1-k) + (v-1)K = 2 forwards ahead, device 0 four."""
    assert schedule("interleaved", 2, 4).devices == rows(
        "F0.0 F0.1 F2.0 F2.1 F0.2 RBW2.0 F0.3 RBW2.1 F2.2 RBW0.0 F2.3 RBW0.1 "
        "RBW2.2 RBW2.3 RBW0.2 RBW0.3",
        "F1.0 F1.1 F3.0 RBW3.0 F3.1 RBW3.1 F1.2 RBW1.0 F1.3 RBW1.1 F3.2 RBW3.2 F3.3 RBW3.3 "
        "RBW1.2 RBW1.3",
    )


def test_zb_h1_puts_off_as_many_weights_as_the_stage_has_stages_before_it() -> None:
    """arXiv 2401.10241, figure 3 (upper half), for three stages."""
    assert schedule("zb-h1", 3, 5).devices == rows(
        "F0.0 F0.1 F0.2 RB0.0 W0.0 F0.3 RB0.1 W0.1 F0.4 RB0.2 W0.2 RB0.3 W0.3 RB0.4 W0.4",
        "F1.0 F1.1 RB1.0 F1.2 RB1.1 W1.0 F1.3 RB1.2 W1.1 F1.4 RB1.3 W1.2 RB1.4 W1.3 W1.4",
        "F2.0 RB2.0 F2.1 RB2.1 F2.2 RB2.2 W2.0 F2.3 RB2.3 W2.1 F2.4 RB2.4 W2.2 W2.3 W2.4",
    )


def test_zb_h2_runs_and_puts_off_twice_as_many() -> None:
    assert schedule("zb-h2", 2, 4).devices == rows(
        "F0.0 F0.1 F0.2 RB0.0 W0.0 F0.3 RB0.1 W0.1 RB0.2 W0.2 RB0.3 W0.3",
        "F1.0 RB1.0 F1.1 RB1.1 F1.2 RB1.2 W1.0 F1.3 RB1.3 W1.1 W1.2 W1.3",
    )


def test_zb_v_with_two_devices() -> None:
    """Device 1 turns round: stage 2 follows stage 1 without a transfer."""
    assert schedule("zb-v", 2, 3).devices == rows(
        "F0.0 F0.1 F0.2 F3.0 RB3.0 W3.0 F3.1 RB3.1 W3.1 RB0.0 W0.0 F3.2 RB3.2 W3.2 "
        "RB0.1 W0.1 RB0.2 W0.2",
        "F1.0 F2.0 F1.1 F2.1 RB2.0 W2.0 F1.2 RB1.0 W1.0 F2.2 RB2.1 W2.1 "
        "RB1.1 RB2.2 RB1.2 W1.1 W2.2 W1.2",
    )


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("h", [1, 2])
def test_zero_bubble_holds_as_much_on_every_stage(h: int, early: bool) -> None:
    """min(h(K-1) + 1, M) between F and W: 1F1B's largest for ZB-H1, 2K-1 for ZB-H2."""
    for K, M in itertools.product(range(1, 9), range(1, 21)):
        most = schedule(f"zb-h{h}", K, M, early_recompute=early).in_flight()
        full = h * (K - 1) + 1
        assert max(most) == most[0] == min(full, M)
        if 2 * full - 1 <= M:  # from there on no stage runs out of forwards too early
            assert set(most) == {full}


def test_1f1b_and_gpipe_in_flight() -> None:
    for K, M in itertools.product(range(1, 9), range(1, 21)):
        assert schedule("1f1b", K, M).in_flight() == tuple(min(K - k, M) for k in range(K))
        assert schedule("gpipe", K, M).in_flight() == (M,) * K
