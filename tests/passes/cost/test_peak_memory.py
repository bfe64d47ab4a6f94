"""The most that is at a stage at once, against a count minute by minute."""

from __future__ import annotations

import random
from typing import Any

import pytest

from autopipe.passes.cost.peak_memory import peak_bytes
from autopipe.passes.cost.phase_memory import StageBytes
from autopipe.passes.ir.split import CALLER, Route
from autopipe.passes.ir.values import TensorSpec
from autopipe.passes.schedule.build import schedule
from autopipe.passes.schedule.simulator import simulate_schedule
from autopipe.runtime.mailbox import queue_capacity

pytestmark = pytest.mark.few(4)


def route(name: str, source: int, *consumers: int, kind: str = "activation") -> Route:
    import torch

    spec = TensorSpec(name, (), torch.float32)
    return Route(spec, kind, source, consumers)


def counted(line: Any, K: int, M: int, nbytes: Any, sources: Any) -> list[int]:
    """By definition: at each action of each stage, what is there."""
    peaks = [0] * K
    spans = [s for row in line.spans for s in row]
    end = {(s.action.phase == "F", s.action.stage, s.action.microbatch): s.end for s in spans}
    for k in range(K):
        mine = [s for s in spans if s.action.stage == k]
        for now, span in enumerate(mine):
            done = mine[: now + 1]
            begun = {
                way: [s for s in done if (s.action.phase == "F") == way] for way in (True, False)
            }
            total = 0
            for way, what in ((True, "received"), (False, "tangents")):
                taken = {s.action.microbatch for s in begun[way]}
                for name, size in getattr(nbytes[k], what).items():
                    source = sources[way, k, name]
                    if source is None:
                        continue
                    left = [m for m in range(M) if m not in taken]
                    came = any(end[way, source, m] < span.end for m in range(M))
                    if way or came or span.action.phase != "F":
                        total += size * min(queue_capacity(source, k), len(left))
            back = {s.action.microbatch for s in begun[False]}
            ahead = [s.action.microbatch for s in done[:-1] if s.action.phase == "F"]
            total += nbytes[k].saved * len([m for m in ahead if m not in back])
            if span.action.phase == "F":
                total += nbytes[k].forward
            else:
                first = len(back) == 1
                total += nbytes[k].first_backward if first else nbytes[k].backward
            peaks[k] = max(peaks[k], total)
    return peaks


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_peaks_by_definition(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    K, M = draw.randint(1, 4), draw.randint(1, 6)
    routes = {f"h{k}": route(f"h{k}", k, k + 1) for k in range(K - 1)}
    if K > 2:
        routes["skip"] = route("skip", 0, 1, K - 1)
        routes["table"] = route("table", 0, K - 1, kind="parameter")
    routes["x"] = route("x", CALLER, 0)
    nbytes, sources = {}, {}
    for k in range(K):
        received = {n: draw.randint(1, 9) for n, r in routes.items() if k in r.consumers}
        received.pop("table", None)
        tangents = {}
        for n, r in routes.items():
            later = [h for h in r.holders if h > k]
            if k in r.holders and later:
                tangents[n] = draw.randint(1, 9)
                sources[False, k, n] = min(later)
        for n in received:
            sources[True, k, n] = None if routes[n].source == CALLER else routes[n].source
        saved, forward, backward = (draw.randint(1, 30) for _ in range(3))
        nbytes[k] = StageBytes(saved, saved + forward, backward, backward + 3, received, tangents)
    line = simulate_schedule(
        schedule(kind, K, M),
        forward=[draw.randint(1, 5) for _ in range(K)],
        backward=[draw.randint(1, 9) for _ in range(K)],
    )
    found = peak_bytes(
        line, K, [2] * M, {(k, 2): n for k, n in nbytes.items()}, routes, queue_capacity
    ).stages
    assert list(found) == counted(line, K, M, nbytes, sources)
    assert all(peak > 0 for peak in found)


def test_gpipe_keeps_all_and_1f1b_few() -> None:
    K, M, saved = 4, 8, 100
    nbytes = {(k, 1): StageBytes(saved, saved, saved, saved, {}, {}) for k in range(K)}
    peaks = {
        kind: peak_bytes(
            simulate_schedule(schedule(kind, K, M), forward=1, backward=2),
            K,
            [1] * M,
            nbytes,
            {},
            queue_capacity,
        ).stages
        for kind in ("gpipe", "1f1b")
    }
    assert peaks["gpipe"] == (M * saved,) * K
    assert peaks["1f1b"] == tuple((K - k) * saved for k in range(K))


def test_a_gradient_may_come_during_the_forward_of_a_stage_that_its_maker_does_not_need() -> None:
    """Two branches that read one value: the second may be through before the first has begun."""
    K, M, size = 3, 4, 10
    routes = {"h": route("h", 0, 1, 2)}
    nbytes = {
        (0, 1): StageBytes(0, 0, 0, 0, {}, {"h": size}),
        (1, 1): StageBytes(0, 500, 0, 0, {"h": size}, {"h": size}),
        (2, 1): StageBytes(0, 0, 0, 0, {"h": size}, {}),
    }
    line = simulate_schedule(schedule("gpipe", K, M), forward=[1, 9, 1], backward=1)
    waiting = size * min(queue_capacity(0, 1), M - 1) + size * queue_capacity(2, 1)
    found = peak_bytes(line, K, [1] * M, nbytes, routes, queue_capacity)
    assert found.stages[1] == found.devices[1] == 500 + waiting


def test_stages_of_one_device_peak_at_different_times() -> None:
    """Stage 0 holds most before its own backward, stage 3, on the same device, in the middle."""
    K, M = 2, 4
    nbytes = {(k, 1): StageBytes(10, 10, 10, 10, {}, {}, 10, 10, 10) for k in range(2 * K)}
    line = simulate_schedule(schedule("zb-v", K, M), forward=1, backward=1, weight=1)
    found = peak_bytes(line, 2 * K, [1] * M, nbytes, {}, queue_capacity)
    for row, peak in zip(line.spans, found.devices, strict=True):
        counted = 0
        alive: set[tuple[int, int]] = set()
        for span in row:
            alive.add((span.action.stage, span.action.microbatch))
            counted = max(counted, 10 * len(alive))
            if "W" in span.action.phase:
                alive.remove((span.action.stage, span.action.microbatch))
        assert peak == counted
    assert found.devices[0] < found.stages[0] + found.stages[3]


@pytest.mark.parametrize("M", [1, 3])
def test_parts_of_a_shared_gradient_are_added_at_the_end(M: int) -> None:
    """The owner has all its sums, a part that arrives, and with one micro-batch a new total."""
    routes = {"h": route("h", 0, 1), "w": route("w", 0, 1, kind="parameter")}
    sums = [{"w": 100, "b": 7}, {"w": 100}]
    nbytes = {(k, 2): StageBytes(1, 2, 3, 4, {}, {}, sums=sums[k]) for k in range(2)}
    line = simulate_schedule(schedule("gpipe", 2, M), forward=1, backward=1)
    found = peak_bytes(line, 2, [2] * M, nbytes, routes, queue_capacity)
    assert found.stages[0] == found.devices[0] == 107 + 100 * (2 if M == 1 else 1)
    assert found.stages[1] == found.devices[1] < 10
