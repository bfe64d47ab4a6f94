"""Cuts with values that stages receive and store copies of, against brute force over all cuts.

Covers partition/stage_reach.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise, product
from typing import Any

import pytest

from autopipe.errors import PartitionError
from autopipe.passes.partition.device_loads import BoundaryValue, DeviceLoads
from autopipe.passes.partition.hetero_cut import cut_for_devices, has_cut_within


def problem(generator: random.Random) -> DeviceLoads:
    N = generator.randint(1, 9)
    K = generator.randint(1, min(4, N))
    values = []
    for _ in range(generator.randint(0, 6)):
        made = generator.randint(-1, N - 1)
        if later := [item for item in range(made + 1, N) if generator.random() < 0.4]:
            values.append(BoundaryValue(made, tuple(later)))

    def row(count: int, most: int) -> tuple[int, ...]:
        return tuple(generator.choice([0, generator.randint(0, most)]) for _ in range(count))

    kinds = [(row(N, 20), row(N, 9), row(len(values), 15), row(len(values), 9)) for _ in range(2)]
    chosen = [generator.choice(kinds) for _ in range(K)]
    return DeviceLoads(
        times=tuple(kind[0] for kind in chosen),
        unit=Fraction(1),
        nbytes=tuple(kind[1] for kind in chosen),
        byte_limits=tuple(generator.choice([None, generator.randint(5, 60)]) for _ in range(K)),
        units_per_byte=(1,) * K,
        values=tuple(values),
        receive_times=tuple(kind[2] for kind in chosen),
        copy_bytes=tuple(kind[3] for kind in chosen),
    )


def stages(loads: DeviceLoads, starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Time and bytes of each stage, by what `DeviceLoads` says of them."""
    for k, (a, b) in enumerate(pairwise([0, *starts, len(loads.times[0])])):
        received = [
            v
            for v, value in enumerate(loads.values)
            if value.producer < a and any(a <= use < b for use in value.consumers)
        ]
        seconds = sum(loads.times[k][a:b]) + sum(loads.receive_times[k][v] for v in received)
        yield seconds, sum(loads.nbytes[k][a:b]) + sum(loads.copy_bytes[k][v] for v in received)


def fits(loads: DeviceLoads, starts: Sequence[int]) -> bool:
    pairs = zip(stages(loads, starts), loads.byte_limits, strict=True)
    return all(limit is None or size <= limit for (_, size), limit in pairs)


def test_cuts_with_transfers_are_optimal() -> None:
    generator = random.Random(5)
    possible = fetched = 0
    for _ in range(4000):
        loads = problem(generator)
        N, K = len(loads.times[0]), len(loads.times)
        cuts = [c for c in combinations(range(1, N), K - 1) if fits(loads, c)]
        if not cuts:
            with pytest.raises(PartitionError, match=r"stage \d does not fit its device"):
                cut_for_devices(loads)
            continue
        possible += 1
        times = {c: max(seconds for seconds, _ in stages(loads, c)) for c in cuts}
        best = min(times.values())
        starts = cut_for_devices(loads)
        assert starts in cuts
        assert times[starts] == best
        assert loads.lower_bound <= best
        assert max(loads.stage_times(starts)) == best
        assert loads.stage_bytes(starts) == tuple(size for _, size in stages(loads, starts))
        fetched += best > loads.lower_bound
        crossing = [generator.randint(0, 3) for p in range(N + 1)]
        weights = {c: sum(crossing[p] for p in c) for c in cuts}
        for slack in (0.0, 0.3):
            within = [c for c in cuts if times[c] <= best * (1 + Fraction(slack))]
            starts = cut_for_devices(loads, crossing, slack)
            assert starts in within
            least = min(weights[c] for c in within)
            assert weights[starts] == least
            tightest = min(times[c] for c in within if weights[c] == least)
            assert times[starts] <= max(tightest, best * (1 + Fraction(1, 1024)) + 1)
    assert 2000 < possible < 3900
    assert fetched > 500


def with_ways(loads: DeviceLoads, generator: random.Random) -> DeviceLoads:
    """The same with up to three rows for each stage, the first of which are the stage's own."""
    N, V = len(loads.times[0]), len(loads.values)
    parts: dict[str, list[Any]] = {
        name: [*getattr(loads, name)]
        for name in (
            "times",
            "nbytes",
            "byte_limits",
            "units_per_byte",
            "receive_times",
            "copy_bytes",
        )
    }
    ways = []
    for k in range(len(loads.times)):
        rows = [k]
        for _ in range(generator.randint(0, 2)):
            rows.append(len(parts["times"]))
            grain = generator.choice([1, 2])
            parts["times"].append(tuple(generator.randint(0, 20) for _ in range(N)))
            parts["nbytes"].append(tuple(grain * generator.randint(0, 9) for _ in range(N)))
            parts["byte_limits"].append(generator.choice([None, grain * generator.randint(0, 40)]))
            parts["units_per_byte"].append(grain)
            parts["receive_times"].append(generator.choice(loads.receive_times))
            parts["copy_bytes"].append(tuple(generator.randint(0, 9) for _ in range(V)))
        generator.shuffle(rows)
        ways.append(tuple(rows))
    return replace(
        loads, stage_options=tuple(ways), **{n: tuple(part) for n, part in parts.items()}
    )


def of_rows(loads: DeviceLoads, rows: Sequence[int]) -> DeviceLoads:
    """Where each stage has one row."""
    names = ("times", "nbytes", "byte_limits", "units_per_byte", "receive_times", "copy_bytes")
    return replace(
        loads, stage_options=(), **{n: tuple(getattr(loads, n)[row] for row in rows) for n in names}
    )


def test_cut_and_ways_are_optimal_together() -> None:
    """Against every cut with every choice of a row for each stage."""
    generator = random.Random(11)
    possible = mixed = only = 0
    for _ in range(1500):
        loads = with_ways(problem(generator), generator)
        N, K = len(loads.times[0]), len(loads.stage_options)
        found: dict[tuple[int, ...], int] = {}
        for rows in product(*loads.stage_options):
            single = of_rows(loads, rows)
            for cut in combinations(range(1, N), K - 1):
                if fits(single, cut):
                    largest = max(seconds for seconds, _ in stages(single, cut))
                    found[cut] = min(largest, found.get(cut, largest))
        if not found:
            with pytest.raises(PartitionError, match=r"stage \d does not fit its device"):
                cut_for_devices(loads)
            continue
        possible += 1
        best = min(found.values())
        assert loads.lower_bound <= best
        starts = cut_for_devices(loads)
        assert found[starts] == best
        chosen = loads.chosen_options(starts)
        assert all(row in rows for row, rows in zip(chosen, loads.stage_options, strict=True))
        single = of_rows(loads, chosen)
        assert fits(single, starts)
        assert loads.stage_times(starts) == single.stage_times(starts)
        assert loads.stage_bytes(starts) == single.stage_bytes(starts)
        assert max(loads.stage_times(starts)) == best
        assert has_cut_within(loads, best)
        assert not best or not has_cut_within(loads, best - 1)
        mixed += len(set(chosen) - set(range(K))) > 0
        alone = [c for c in found if fits(of_rows(loads, range(K)), c)]
        only += not alone
        crossing = [generator.randint(0, 3) for _ in range(N + 1)]
        within = [c for c, seconds in found.items() if seconds <= best * (1 + Fraction(0.3))]
        tried = cut_for_devices(loads, crossing, 0.3)
        assert tried in within
        weights = {c: sum(crossing[p] for p in c) for c in within}
        assert weights[tried] == min(weights.values())
    assert 1000 < possible < 1500
    assert mixed > 300
    assert only > 20


def test_of_several_ways_that_do_not_fit_the_nearest_is_named() -> None:
    loads = DeviceLoads(
        ((1, 1), (2, 2)), Fraction(1), ((5, 5), (4, 4)), (9, 6), (1, 1), stage_options=((0, 1),)
    )
    with pytest.raises(PartitionError, match="stage 0 does not fit its device: 1 bytes") as error:
        cut_for_devices(loads)
    assert error.value.expected == "10 bytes for items 0 to 1 of 2"
    assert loads.chosen_options(()) == (0,)


def test_the_items_of_what_does_not_fit_are_named() -> None:
    loads = DeviceLoads(((1, 1),), Fraction(1), ((5, 5),), (9,), (1,), item_names=("first", "last"))
    with pytest.raises(PartitionError, match="stage 0 does not fit its device: 1 bytes") as error:
        cut_for_devices(loads)
    assert error.value.expected == "10 bytes for ops first to last"


@pytest.mark.parametrize("limited", [False, pytest.param(True, marks=pytest.mark.full)])
def test_sixty_thousand_items_in_128_stages(limited: bool) -> None:
    """Layers of 36 items, a value from each to the next and one to all; seconds of the processor.

    (On one core of an EPYC: 2 to 8 s.)
    """
    layers, K = 1663, 128
    N = 36 * layers
    generator = random.Random(0)
    layer = [generator.randrange(1 << 30) for _ in range(36)]
    values = [BoundaryValue(item, (item + 1,)) for item in range(N - 1)]
    values.append(BoundaryValue(-1, tuple(range(5, N, 36))))
    time_row, byte_row = tuple(layer * layers), (1000,) * N
    fetching = tuple(generator.randrange(1 << 28) for _ in values)
    loads = DeviceLoads(
        times=(time_row,) * K,
        unit=Fraction(1),
        nbytes=(byte_row,) * K,
        byte_limits=tuple(1000 * (N // K + 40) + 100 * k if limited else None for k in range(K)),
        units_per_byte=(1,) * K,
        values=tuple(values),
        receive_times=(fetching,) * K,
        copy_bytes=((10,) * len(values),) * K,
    )
    crossing = [1 + bool(p % 36) for p in range(N + 1)]
    began = time.process_time()
    starts = cut_for_devices(loads, crossing, 0.03)
    assert time.process_time() - began < 30
    assert fits(loads, starts) if limited else len(starts) == K - 1
    assert max(loads.stage_times(starts)) <= 1.1 * loads.lower_bound
