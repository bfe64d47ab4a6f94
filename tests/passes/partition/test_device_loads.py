"""Cuts on devices that differ, against brute force in exact arithmetic."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import pytest

from autopipe.errors import OptionError, PartitionError, VerifyError
from autopipe.passes.partition.api import partition
from autopipe.passes.partition.cost_graph import CostGraph
from autopipe.passes.partition.device_loads import DeviceLoads, DeviceSpec
from autopipe.passes.partition.hetero_cut import cut_for_devices

# ------------------------------------------------------------------------------------ the oracle


def stage_times(
    devices: Sequence[DeviceSpec], seconds: Sequence[float], starts: Sequence[int]
) -> list[Fraction]:
    times = []
    for device, (a, b) in zip(devices, pairwise([0, *starts, len(seconds)]), strict=True):
        own = seconds if device.seconds is None else device.seconds
        speed = Fraction(device.speed) if device.seconds is None else Fraction(1)
        times.append(sum(map(Fraction, own[a:b]), Fraction(0)) / speed)
    return times


def fits(
    devices: Sequence[DeviceSpec],
    parameters: Sequence[int],
    activations: Sequence[int],
    starts: Sequence[int],
) -> bool:
    for device, (a, b) in zip(devices, pairwise([0, *starts, len(parameters)]), strict=True):
        kept = Fraction(device.parameter_factor) * sum(parameters[a:b])
        kept += device.in_flight * sum(activations[a:b])
        if device.memory_bytes is not None and kept > device.memory_bytes:
            return False
    return True


def some_devices(generator: random.Random, N: int, K: int) -> list[DeviceSpec]:
    return [
        DeviceSpec(
            speed=generator.choice([1.0, 0.7, 2.0, 3.3]),
            seconds=generator.choice([None, None, tuple(generator.random() for _ in range(N))]),
            memory_bytes=generator.choice([None, generator.randint(0, 40)]),
            parameter_factor=generator.choice([1.0, 4.0, 0.3]),
            in_flight=generator.randint(0, 3),
        )
        for _ in range(K)
    ]


Problem = tuple[list[DeviceSpec], list[float], list[int], list[int]]


def problems(seed: int, count: int) -> Iterator[Problem]:
    generator = random.Random(seed)
    for _ in range(count):
        N = generator.randint(1, 8)
        K = generator.randint(1, min(4, N))
        seconds = [generator.choice([0.0, 0.1, 0.3, 1.0, generator.random()]) for _ in range(N)]
        sizes = [[generator.randint(0, 9) for _ in range(N)] for _ in range(2)]
        yield some_devices(generator, N, K), seconds, sizes[0], sizes[1]


def test_cuts_on_devices_are_optimal() -> None:
    possible = 0
    for devices, seconds, parameters, activations in problems(seed=0, count=1500):
        N, K = len(seconds), len(devices)
        loads = DeviceLoads.of(devices, seconds, parameters, activations)
        cuts = [
            c for c in combinations(range(1, N), K - 1) if fits(devices, parameters, activations, c)
        ]
        if not cuts:
            with pytest.raises(PartitionError, match=r"stage \d does not fit its device"):
                cut_for_devices(loads)
            continue
        possible += 1
        times = {c: max(stage_times(devices, seconds, c)) for c in cuts}
        best = min(times.values())
        assert times[cut_for_devices(loads)] == best
        assert loads.lower_bound * loads.unit <= best
        crossing = [(7 * p * p + 3) % 10 for p in range(N + 1)]
        for slack in (0.0, 0.25):
            within = [c for c in cuts if times[c] <= best * (1 + Fraction(slack))]
            starts = cut_for_devices(loads, crossing, slack)
            assert starts in within
            weights = [sum(crossing[p] for p in c) for c in within]
            assert sum(crossing[p] for p in starts) == min(weights)
    assert 500 < possible < 1400


def test_a_device_twice_as_fast_takes_twice_as_much() -> None:
    loads = DeviceLoads.of([DeviceSpec(speed=2.0), DeviceSpec()], [1.0] * 6, [0] * 6, [0] * 6)
    assert cut_for_devices(loads) == (4,)
    assert loads.lower_bound * loads.unit == 2
    assert [time * loads.unit for time in loads.stage_times((4,))] == [2, 2]


def test_times_of_a_device_take_the_place_of_the_graphs() -> None:
    slow_first = DeviceSpec(seconds=(9.0, 1.0, 1.0, 1.0))
    loads = DeviceLoads.of([DeviceSpec(), slow_first], [1.0] * 4, [0] * 4, [0] * 4)
    assert cut_for_devices(loads) == (2,)
    assert cut_for_devices(
        DeviceLoads.of([slow_first, DeviceSpec()], [1.0] * 4, [0] * 4, [0] * 4)
    ) == (1,)


def test_memory_is_parameters_by_a_factor_and_activations_in_flight() -> None:
    device = DeviceSpec(parameter_factor=4.0, in_flight=3, memory_bytes=100)
    loads = DeviceLoads.of([device, DeviceSpec()], [1.0] * 4, [10, 10, 0, 0], [5, 5, 5, 5])
    assert loads.stage_bytes((1,)) == (4 * 10 + 3 * 5, 10 + 15)
    assert cut_for_devices(loads) == (1,)  # two nodes would be 110 bytes
    roomy = dataclasses.replace(device, memory_bytes=110)
    assert cut_for_devices(
        DeviceLoads.of([roomy, DeviceSpec()], [1.0] * 4, [10, 10, 0, 0], [5] * 4)
    ) == (2,)


def test_bytes_are_rounded_up() -> None:
    loads = DeviceLoads.of([DeviceSpec(parameter_factor=0.5)], [1.0], [3], [0])
    assert loads.stage_bytes(()) == (2,)


def test_what_is_missing_is_said_by_stage() -> None:
    small, tiny = DeviceSpec(memory_bytes=20), DeviceSpec(memory_bytes=4)
    with pytest.raises(PartitionError, match="stage 1 does not fit its device: 15 bytes") as error:
        cut_for_devices(DeviceLoads.of([small, small], [1.0] * 11, [5] * 11, [0] * 11))
    assert (error.value.expected, error.value.found) == (
        "35 bytes for items 4 to 10 of 11",
        "20 bytes",
    )
    with pytest.raises(PartitionError, match="stage 0 does not fit its device: 1 bytes"):
        cut_for_devices(DeviceLoads.of([tiny, DeviceSpec()], [1.0] * 3, [5] * 3, [0] * 3))
    with pytest.raises(PartitionError, match="stage 1 does not fit its device: 1 bytes"):
        cut_for_devices(
            DeviceLoads.of([DeviceSpec(), tiny, DeviceSpec()], [1.0] * 3, [5] * 3, [0] * 3)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 0.0}, "`speed`"),
        ({"speed": float("nan")}, "`speed`"),
        ({"memory_bytes": -1}, "`memory_bytes`"),
        ({"parameter_factor": -1.0}, "`parameter_factor`"),
        ({"in_flight": -1}, "`in_flight`"),
        ({"seconds": (1.0,)}, "`seconds`"),
        ({"seconds": (1.0, -1.0)}, "`seconds`"),
    ],
)
def test_devices_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DeviceLoads.of([DeviceSpec(**change)], [1.0, 1.0], [0, 0], [0, 0])


# ------------------------------------------------------------------------------------- partition

GRAPH = CostGraph(
    names=("a", "b", "c", "d"),
    seconds=(1.0, 2.0, 3.0, 4.0),
    edges=((0, 1), (0, 2), (1, 3), (2, 3)),
    nbytes=(8, 8, 8, 8),
    parameter_nbytes=(1, 1, 1, 1),
)
DEVICES = (DeviceSpec(speed=2.0), DeviceSpec(memory_bytes=20))


def test_a_partition_on_devices() -> None:
    result = partition(GRAPH, 2, devices=DEVICES)
    result.verify(GRAPH, DEVICES)
    assert dict(result.stage_of) == {"a": 0, "b": 0, "c": 0, "d": 1}
    assert result.stage_seconds == (3.0, 4.0)
    assert result.lower_bound == 3.5  # 10 / 3, but every stage takes a multiple of half a second
    assert result.stage_bytes == (27, 9)


def test_partitions_on_devices_verify_and_keep_to_the_orders_optimum() -> None:
    generator = random.Random(1)
    fitted = 0
    for devices, seconds, parameters, activations in problems(seed=2, count=150):
        N, K = len(seconds), len(devices)
        edges = [(a, b) for a in range(N) for b in range(a + 1, N) if generator.random() < 0.3]
        names = tuple(map(str, range(N)))
        sizes = tuple(activations), tuple(parameters)
        graph = CostGraph(names, tuple(seconds), tuple(edges), *sizes)
        order = graph.order()
        rows = [
            d
            if d.seconds is None
            else dataclasses.replace(d, seconds=tuple(d.seconds[v] for v in order))
            for d in devices
        ]
        turned = [[values[v] for v in order] for values in (seconds, parameters, activations)]
        cuts = [c for c in combinations(range(1, N), K - 1) if fits(rows, *turned[1:], c)]
        if not cuts:
            continue  # another order may have one
        fitted += 1
        result = partition(graph, K, devices=devices)
        result.verify(graph, devices)
        best = min(max(stage_times(rows, turned[0], c)) for c in cuts)
        assert result.bottleneck <= float(best)
    assert fitted > 50


def test_nothing_fits() -> None:
    with pytest.raises(PartitionError, match=r"stage 1 does not fit its device: \d+ bytes"):
        partition(GRAPH, 2, devices=[DeviceSpec(memory_bytes=9)] * 2)
    with pytest.raises(OptionError, match="`devices`"):
        partition(GRAPH, 2, devices=DEVICES[:1])


@pytest.mark.parametrize(
    ("change", "devices", "message"),
    [
        ({}, DEVICES[:1], "2 stages on 1 devices"),
        ({}, (DeviceSpec(), DEVICES[1]), "cost of stage 0"),
        ({}, (DEVICES[0], DeviceSpec(memory_bytes=8)), "stage 1 does not fit"),
        ({"stage_bytes": (27, 8)}, DEVICES, "bytes of the stages"),
        ({"stage_bytes": None}, DEVICES, "bytes of the stages"),
        ({"lower_bound": 4.0}, DEVICES, "lower bound"),
    ],
)
def test_partitions_on_devices_that_are_wrong_are_caught(
    change: dict[str, Any], devices: Sequence[DeviceSpec], message: str
) -> None:
    result = dataclasses.replace(partition(GRAPH, 2, devices=DEVICES), **change)
    with pytest.raises(VerifyError, match=message):
        result.verify(GRAPH, devices)
