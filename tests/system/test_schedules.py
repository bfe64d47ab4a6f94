"""Every schedule gives GPipe's results, bit for bit, and keeps the memory that it promises."""

from __future__ import annotations

import random

import pytest
from torch import Tensor

import autopipe
from autopipe.errors import MemoryLimitError
from autopipe.passes.schedule import (
    KINDS,
    Action,
    DeviceSchedule,
    Scheduled,
    schedule,
    schedule_for,
)
from autopipe.runtime.executor import Run
from tests.support.early_schedules import EARLY, Layers, WithLoss, assert_same, batch, step
from tests.support.models import MODELS
from tests.support.once import pure_passes_once
from tests.support.tiers import full_unless


@pytest.fixture(scope="module", autouse=True)
def _once():
    with pure_passes_once():
        yield


SMALL = ("fan_out", "two_inputs", "tied", "integer_boundary")


@pytest.mark.few(8)
@pytest.mark.usefixtures("each_stage_cut_alone")
@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
@pytest.mark.parametrize("kind", EARLY)
@pytest.mark.parametrize("name", [pytest.param(n, marks=full_unless(n in SMALL)) for n in MODELS])
def test_results_are_gpipes_bit_for_bit(name: str, kind: str, remat: str) -> None:
    model, inputs = MODELS[name].make()
    for K, M, samples in ((1, 3, 7), (2, 4, 4), (3, 5, 9)):
        options = {"chunks": M, "remat": remat, "batch_norm": "micro"}
        stages = schedule_for(kind, K).stages
        expected = step(WithLoss(model), inputs(samples), devices=stages, **options)
        found = step(WithLoss(model), inputs(samples), devices=K, schedule=kind, **options)
        assert_same(found, expected)


def earlier(action: Action) -> list[Action]:
    """What runs before it, so that gradients add up in the order of micro-batches."""
    m, k = action.microbatch - 1, action.stage
    return [Action(letter, k, m) for letter in action.phase if letter in "FBW" and m >= 0]


def mixed(K: int, M: int, seed: int) -> Scheduled:
    """A random valid schedule: any device may run any action that it could run."""
    draw = random.Random(seed)
    rows: list[list[Action]] = [[] for _ in range(K)]
    cuts = {
        (k, m): draw.choice([("RBW",), ("RB", "W"), ("R", "BW"), ("R", "B", "W")])
        for k in range(K)
        for m in range(M)
    }
    todo: dict[tuple[int, str], list[Action]] = {}
    for k in range(K):
        todo[k, "F"] = [Action("F", k, m) for m in range(M)]
        for letter in "RBW":
            todo[k, letter] = [
                Action(phase, k, m) for m in range(M) for phase in cuts[k, m] if phase[0] == letter
            ]
    done: set[Action] = set()
    while any(todo.values()):
        ready = [
            queue
            for queue in todo.values()
            if queue and done.issuperset([*queue[0].needs(K), *earlier(queue[0])])
        ]
        action = draw.choice(ready).pop(0)
        rows[action.stage].append(action)
        done |= {Action(letter, action.stage, action.microbatch) for letter in action.phase}
    return Scheduled("mixed", K, M, tuple(map(tuple, rows)))


@pytest.mark.few(4)
@pytest.mark.parametrize("seed", range(12))
def test_any_valid_order_gives_the_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    K, M = 1 + seed % 3, 1 + seed % 5
    options = {"devices": K, "chunks": M, "remat": ["full", "none", "min-cut"][seed % 3]}
    expected = step(Layers(), (batch(), {}), **options)
    planned = mixed(K, M, seed)
    planned.verify()
    monkeypatch.setattr(DeviceSchedule, "scheduled", lambda *args, **kwargs: planned)
    assert_same(step(Layers(), (batch(), {}), schedule="1f1b", **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_micro_batches_are_in_flight_than_planned(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min(K - k, M) at stage k with 1f1b and zb-h1 until B, M with gpipe (until W, one more)."""
    K, M = 3, 6
    planned = schedule(kind, K, M).in_flight()
    now: dict[int, set[int]] = {k: set() for k in range(len(planned))}
    most = [0] * len(planned)
    save, pop = Run.save, Run.pop_saved

    def saving(run: Run, stage: int, m: int, tensors: list[Tensor]) -> None:
        now[stage].add(m)
        most[stage] = max(most[stage], len(now[stage]))
        save(run, stage, m, tensors)

    def popping(run: Run, stage: int, m: int) -> list[Tensor]:
        now[stage].discard(m)
        return pop(run, stage, m)

    monkeypatch.setattr(Run, "save", saving)
    monkeypatch.setattr(Run, "pop_saved", popping)
    step(Layers(8), (batch(12), {}), devices=K, chunks=M, schedule=kind)
    assert all(found <= limit for found, limit in zip(most, planned, strict=True))
    assert sum(found > 0 for found in most) >= len(planned) - 1  # the loss alone saves nothing
    if kind in ("gpipe", "1f1b"):
        assert most == list(planned)
    if kind == "1f1b":
        assert most == [min(K - k, M) for k in range(K)]


@pytest.mark.few(12)
@pytest.mark.parametrize("remat", ["full", "none", "min-cut", 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_bytes_that_are_saved_at_most(kind: str, remat: str | float) -> None:
    """Also those that are kept for delayed gradients of parameters."""
    model = Layers(8, 6)
    pipe = autopipe.compile(model, devices=4, chunks=16, schedule=kind, remat=remat)
    pipe(*batch(32)).backward()
    pipe.memory.reset()
    pipe(*batch(32)).backward()
    measured = [stage.peak for stage in pipe.memory.stages]
    assert measured == [stage.peak_saved_bytes for stage in pipe.plan.stages]
    of_devices = [device.peak for device in pipe.memory.devices]
    assert of_devices == [total.peak_saved_bytes for total in pipe.plan.totals]
    if kind == "1f1b":
        whole = autopipe.compile(model, devices=4, chunks=16, remat=remat)
        whole(*batch(32)).backward()
        assert measured[0] <= whole.memory.stages[0].peak / 2


@pytest.mark.parametrize("kind", ["1f1b", "zb-v"])
def test_a_limit_is_for_all_stages_of_a_device(kind: str) -> None:
    """Exactly what a plan needs is enough, for the planned batch alone."""
    options = {"devices": 2, "chunks": 4, "schedule": kind}
    plan = autopipe.plan(Layers(8), args=batch(8), **options)
    needs = [total.memory_bytes for total in plan.totals]
    pipe = autopipe.compile(Layers(8), memory=needs, **options)
    pipe(*batch(8)).backward()
    assert all(t.memory_bytes <= n for t, n in zip(pipe.plan.totals, needs, strict=True))
    with pytest.raises(MemoryLimitError, match=r"device.* with this batch") as caught:
        pipe(*batch(64))
    assert ("do not fit device" in str(caught.value)) == (kind == "zb-v")
    with pytest.raises(MemoryLimitError):
        autopipe.plan(Layers(8), args=batch(8), memory=[n // 3 for n in needs], **options)
