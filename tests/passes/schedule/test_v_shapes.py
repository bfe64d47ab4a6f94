"""V-Min and V-Half: published memory, bubbles, and the building blocks by themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from autopipe.passes.schedule.actions import Scheduled
from autopipe.passes.schedule.build import schedule
from autopipe.passes.schedule.schedule_kind import Order
from autopipe.passes.schedule.simulator import simulate
from autopipe.passes.schedule.v_shapes import PERIOD, v_half, v_min

KINDS = ("v-min", "v-half")
PUBLISHED: dict[str, Callable[[int], int]] = {
    # micro-batches of a whole device (two stages), of the authors' table for arXiv 2405.15362
    "v-min": lambda K: (K + 4) // 3,
    "v-half": lambda K: (K + 2) // 2,
}


def idle(kind: str, K: int, M: int) -> float:
    """The bubble in units of F of one stage: F = B = W = 1, so 6 per micro-batch and device."""
    timeline = simulate(kind, stages=K, chunks=M, forward=2, backward=2, weight=2)
    return max(timeline.device_spans) - PERIOD * M


def kept(scheduled: Scheduled) -> list[int]:
    """Per device, the most (stage, micro-batch) pairs between F and W: sets, written down."""
    peaks = []
    for row in scheduled.devices:
        alive: set[tuple[int, int]] = set()
        peaks.append(0)
        for action in row:
            if action.phase == "F":
                alive.add((action.stage, action.microbatch))
            elif action.phase == "W":
                alive.remove((action.stage, action.microbatch))
            peaks[-1] = max(peaks[-1], len(alive))
    return peaks


def weights(taken: list[int], first: int) -> list[int]:
    """Where W's may go that are free modulo 6, from the time `first` on, within a period."""
    return [t for t in range(first, first + PERIOD) if all((t - one) % PERIOD for one in taken)]


def steady_peak(spans: list[tuple[int, int]]) -> int:
    """Most copies alive at once, of spans (F starts, W starts) that repeat every 6 units."""
    late = max(end for _, end in spans) + 1
    clock = range(late, late + PERIOD)
    starts = range(-late - late % PERIOD, late + PERIOD, PERIOD)
    return max(sum(t + a <= now <= t + b for a, b in spans for t in starts) for now in clock)


def least_peak(K: int, hops: tuple[int, int, int, int]) -> int | None:
    """The least memory of any block with these hops: all waits, all places of W. None: no block."""
    best = None
    for waits in itertools.product(range(PERIOD), repeat=3):
        peaks: list[int] = []
        for k in range(K):
            down, up = hops[0] * k, hops[0] * (K - 1) + 1 + waits[0] + hops[1] * (K - 1 - k)
            top = hops[0] * (K - 1) + hops[1] * (K - 1) + 2 + waits[0] + waits[1]
            turn = top + hops[2] * (K - 1) + 1 + waits[2]
            back_up, back_down = top + hops[2] * k, turn + hops[3] * (K - 1 - k)
            taken = [down, up, back_up, back_down]
            if len({t % PERIOD for t in taken}) < 4:
                break
            peaks.append(
                min(
                    steady_peak([(down, w_down), (up, w_up)])
                    for w_up in weights(taken, back_up + 1)
                    for w_down in weights([*taken, w_up], back_down + 1)
                )
            )
        if len(peaks) == K and (best is None or max(peaks) < best):
            best = max(peaks)
    return best


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_up_to_twelve_devices_and_forty_micro_batches_verify(kind: str) -> None:
    """And hold no more than published; R by itself changes nothing in that."""
    for K, M in itertools.product(range(1, 13), range(1, 41)):
        made = schedule(kind, K, M)
        made.verify()
        assert [{a.stage for a in row} for row in made.devices] == [
            {k, 2 * K - 1 - k} for k in range(K)
        ]
        peaks = made.device_in_flight()
        assert max(peaks) <= min(2 * PUBLISHED[kind](K), 2 * M)
        assert peaks == schedule(kind, K, M, early_recompute=True).device_in_flight()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_the_published_one(kind: str) -> None:
    """(K + 4)//3 and (K + 2)//2 micro-batches, of 1F1B's K; all in use from M = 2K on."""
    for K in range(1, 25):
        made = schedule(kind, K, 2 * K)
        assert list(made.device_in_flight()) == kept(made)
        assert max(made.device_in_flight()) == 2 * PUBLISHED[kind](K)


@pytest.mark.parametrize(
    ("kind", "hops", "s"), [("v-min", (1, 1, 1, 1), 2), ("v-half", (2, 1, 2, 1), 3)]
)
def test_no_block_with_these_hops_holds_less(
    kind: str, hops: tuple[int, int, int, int], s: int
) -> None:
    """All waits and all places of W are tried; 2s(K - 1)/6 is what spans alone give."""
    for K in range(1, 9):
        best = least_peak(K, hops)
        assert best == 2 * PUBLISHED[kind](K)
        assert best >= 2 * s * (K - 1) / PERIOD


@pytest.mark.parametrize("kind", KINDS)
def test_bubbles_are_no_larger_than_those_of_the_repeated_block(kind: str) -> None:
    """For any M. B of the first stage starts 2s(K - 1) + 3 units after F, and the block's waits;
    its W at most 5 later, and ends 1 later; 6 are work."""
    for K, M in itertools.product(range(1, 11), range(1, 31)):
        s, waits = (2, 0 if K % 3 else 2) if kind == "v-min" else (3, 1 if K % 2 else 4)
        assert idle(kind, K, M) <= 2 * s * (K - 1) + 3 + waits + 5 + 1 - PERIOD


def test_v_half_has_half_of_the_bubble_of_1f1b() -> None:
    """The paper: a share of about p/2m, or 3K. Here 3K - 4, or 3K - 7 if K is even and M large."""
    for K in range(2, 17):
        for M in (K, K + 1, 2 * K - 1, 2 * K, 3 * K, 4 * K):
            found, half = idle("v-half", K, M), PERIOD * (K - 1) / 2
            assert found <= half
            if K % 2 or (K > 2 and M >= 2 * K - 1):
                assert found == (half - 1 if K % 2 else half - 4)


def idle_time(kind: str, K: int, M: int, F: float, B: float, W: float, transfer: float) -> float:
    """The bubble as a time; F, B and W of a whole device."""
    times = {"forward": F, "backward": B, "weight": W, "transfer": transfer}
    timeline = simulate(kind, stages=K, chunks=M, **times)  # type: ignore[arg-type]
    return max(timeline.device_spans) - M * (F + B + W)


@pytest.mark.parametrize("K", [3, 4])
def test_the_bubble_of_v_half_grows_with_m_only_where_the_authors_say(K: int) -> None:
    """W + 2B >= 2F and W + 2F >= 2B: exactly then, the block's hops leave enough time."""
    for F, B, W in itertools.product((4, 6, 8, 10), repeat=3):
        few, many = (idle_time("v-half", K, M, F, B, W, 0) for M in (4 * K, 6 * K))
        assert (few == many) == (W + 2 * B >= 2 * F and W + 2 * F >= 2 * B)
        assert few <= many


def test_delays_add_up_over_micro_batches_with_v_min_and_not_with_v_half() -> None:
    """A block with hops of 2 has time left between devices, one with hops of 1 has none."""
    for K, costs in itertools.product(
        (4, 5, 8), ((20, 20, 16, 0), (20, 26, 14, 0), (20, 22, 18, 0), (20, 20, 20, 4))
    ):
        few, many = (idle_time("v-half", K, M, *costs) for M in (4 * K, 8 * K))
        assert few == many < idle_time("1f1b", K, 4 * K, *costs)
        few, many = (idle_time("v-min", K, M, *costs) for M in (4 * K, 8 * K))
        assert few < many


def test_v_min_has_two_thirds_of_the_bubble_of_1f1b() -> None:
    """The paper: a share of about 2p/3m, or 4K."""
    for K in range(2, 17):
        for M in (K, K + 1, 2 * K - 1, 2 * K, 3 * K, 4 * K):
            found, thirds = idle("v-min", K, M), 2 * PERIOD * (K - 1) / 3
            assert found <= thirds
            if M >= 2 * K - 1 and K % 3 != 1:
                assert found == thirds - 3


def test_a_third_and_half_of_1f1b_with_many_devices() -> None:
    for K in (24, 33, 64):
        peaks = [max(schedule(kind, K, K).device_in_flight()) for kind in KINDS]
        assert peaks == [2 * ((K + 4) // 3), 2 * ((K + 2) // 2)]
        zb_v = max(schedule("zb-v", K, 2 * K).device_in_flight())
        assert zb_v == 2 * K
        assert idle("v-half", K, 2 * K) == (3 * K - 4 if K % 2 else 3 * K - 7)
        assert idle("v-min", K, K) <= 4 * K - 4


@pytest.mark.parametrize("order", [v_min, v_half])
def test_the_first_units_of_two_devices_by_hand(order: Callable[[int, int, int], Order]) -> None:
    """Device 0 may hold 4: it runs F down while it waits, and keeps a place for each F up.

    Unit:     0     1     2     3     4     5     6
    device 0  F0.0  F0.1  F0.2  F3.0  B3.0  W3.0  F3.1
    device 1        F1.0  F2.0  F1.1  F2.1  B2.0
    """
    rows = [[f"{letter}{stage}.{m}" for letter, stage, m in row] for row in order(2, 3, 2)]
    assert " ".join(rows[0][:7]) == "F0.0 F0.1 F0.2 F3.0 B3.0 W3.0 F3.1"
    assert " ".join(rows[1][:5]) == "F1.0 F2.0 F1.1 F2.1 B2.0"


@pytest.mark.parametrize("order", [v_min, v_half])
def test_one_device_takes_micro_batches_through_both_stages(
    order: Callable[[int, int, int], Order],
) -> None:
    letters = [("F", 0), ("F", 1), ("B", 1), ("B", 0)]
    (row,) = order(1, 3, 2)
    for m in range(3):
        mine = [(letter, stage) for letter, stage, one in row if one == m]
        assert [one for one in mine if one[0] != "W"] == letters
    for M in (1, 4):
        assert idle("v-min", 1, M) == idle("v-half", 1, M) == 0
