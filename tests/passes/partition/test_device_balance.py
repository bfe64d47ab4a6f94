"""Even devices: against all cuts of small rows, and what it must not change."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from autopipe.passes.partition import DeviceLoads, balance_devices, cut_for_devices

SLACK = 0.03


def interleaved(K: int) -> list[int]:
    return [*range(K), *range(K)]


def v_shape(K: int) -> list[int]:
    return [*range(K), *reversed(range(K))]


def busiest(loads: DeviceLoads, starts: tuple[int, ...], homes: list[int]) -> int:
    busy = dict.fromkeys(homes, 0)
    for home, time in zip(homes, loads.stage_times(starts), strict=True):
        busy[home] += time
    return max(busy.values())


def cut(costs: list[int], homes: list[int]) -> tuple[DeviceLoads, int, tuple[int, ...], list[int]]:
    """Loads, limit, the cut to start from, and crossing."""
    loads = DeviceLoads.of_equal_devices(costs, len(homes))
    crossing = [0] + [1 + i % 3 for i in range(len(costs) - 1)] + [0]
    starts = cut_for_devices(loads, crossing, SLACK)
    limit = int(max(loads.stage_times(cut_for_devices(loads))) * (1 + SLACK))
    return loads, limit, starts, crossing


def balanced(costs: list[int], homes: list[int]) -> tuple[int, int, int]:
    """The busiest device before, after, and of the best cut within the limit."""
    loads, limit, starts, crossing = cut(costs, homes)
    found = balance_devices(loads, starts, homes, limit=limit, crossing=crossing, near=SLACK)
    assert list(found) == sorted(set(found) & set(range(1, len(costs))))
    assert max(loads.stage_times(found)) <= limit
    every = combinations(range(1, len(costs)), len(homes) - 1)
    within = (each for each in every if max(loads.stage_times(each)) <= limit)
    best = min(busiest(loads, each, homes) for each in within)
    return busiest(loads, starts, homes), busiest(loads, found, homes), best


def test_eight_layers_in_six_stages() -> None:
    """Three devices: 3, 3 and 2 layers; stages filled from the left have 4, 2 and 2."""
    homes = interleaved(3)
    before, after, best = balanced([10] * 8, homes)
    assert (after, best) == (30, 30)
    assert before >= 30
    loads = DeviceLoads.of_equal_devices([10] * 8, 6)
    filled = cut_for_devices(loads, [0] * 9, 0.0)
    found = balance_devices(loads, filled, homes, limit=20, crossing=[0] * 9, near=SLACK)
    assert busiest(loads, found, homes) == 30


def test_against_all_cuts() -> None:
    """Drawn rows: never worse, and in nearly all of them the best."""
    draw = random.Random(0)
    best_found = made_better = 0
    for _ in range(200):
        homes = draw.choice([interleaved, v_shape])(draw.choice([2, 3]))
        count = draw.randint(len(homes), 11)
        costs = [draw.choice([10, 10, 10, draw.randint(1, 40)]) for _ in range(count)]
        before, after, best = balanced(costs, homes)
        assert best <= after <= before
        best_found += after <= max(best, (1 + SLACK) * sum(costs) / (1 + max(homes)))
        made_better += after < before
    assert best_found >= 190
    assert made_better >= 40


@pytest.mark.parametrize("costs", [[10] * 12, [1] * 600])
def test_even_devices_are_left_alone(costs: list[int]) -> None:
    homes = interleaved(3)
    loads, limit, starts, crossing = cut(costs, homes)
    assert starts == balance_devices(
        loads, starts, homes, limit=limit, crossing=crossing, near=SLACK
    )


def test_a_stage_stays_within_its_memory() -> None:
    """Even devices would need a stage with two items where only one fits."""
    homes = interleaved(2)
    free = DeviceLoads.of_equal_devices([10] * 6, 4)
    tight = DeviceLoads(
        free.times, free.unit, ((1,) * 6,) * 4, (2, 1, 2, 1), (1,) * 4
    )  # stages 1 and 3 hold one item each
    starts = (2, 3, 5)
    found = balance_devices(tight, starts, homes, limit=20, crossing=[0] * 7, near=SLACK)
    assert found == starts
    assert tight.fits(found)
    moved = balance_devices(free, starts, homes, limit=20, crossing=[0] * 7, near=SLACK)
    assert busiest(free, moved, homes) == 30
    assert not tight.fits(moved)
