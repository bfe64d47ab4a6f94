"""Plans under limits of memory: cut, rematerialization and micro-batches chosen together.

Covers planning/cut_trials.py.
"""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe import Plan
from autopipe.errors import MemoryLimitError
from autopipe.passes.remat_policies import parse_policy
from autopipe.planning.search import NORMALISED_TOGETHER
from autopipe.runtime.executor import Run
from benchmarks.ledger import watching
from tests.support.models import gpt2
from tests.support.once import pure_passes_once

pytestmark = pytest.mark.few(1)

CPUS = ["cpu"] * 2
BATCH = 4
MOSTLY_PARAMETERS = (1.0, 0.96, 0.92, 0.88, 0.85, 0.82, 0.79, 0.76)
FRACTIONS = {
    "skip": (1.0, 0.88, 0.77, 0.68, 0.6, 0.53, 0.46, 0.4),
    "shared": MOSTLY_PARAMETERS,
    "gpt2": MOSTLY_PARAMETERS,
}
"""Limits that are tried, of what the largest stage takes without one."""


def of_models(*cases: tuple[Any, ...]) -> list[Any]:
    """Parameters that begin with a model's name: one worker has all plans of a model."""
    return [pytest.param(*c, marks=pytest.mark.xdist_group(f"search {c[0]}")) for c in cases]


SMALL = [(name, FRACTIONS[name][i]) for name in ("skip", "shared") for i in (2, 5)]
"""For tests of many plans."""


class Skip(nn.Module):
    """Layers of several cheap calls each, and a value that the last of them needs of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = torch.tanh(nn.functional.gelu(layer(x))) * x
        return (x + first).square().mean()


class Shared(nn.Module):
    """A table at both ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return nn.functional.cross_entropy((x @ self.table.weight.T).flatten(0, 1), ids.flatten())


def made(name: str, batch: int = BATCH) -> tuple[nn.Module, dict[str, Any]]:
    """A model and a call of it."""
    generator = torch.Generator().manual_seed(batch)
    if name == "skip":
        return Skip(), {"x": torch.randn(batch, 24, 32, generator=generator)}
    if name == "shared":
        return Shared(), {"ids": torch.randint(0, 64, (batch, 24), generator=generator)}
    model, inputs = gpt2(layers=2)
    return model, inputs(batch)[1]


@pytest.fixture(scope="module", autouse=True)
def _once() -> Iterator[None]:
    with pure_passes_once():
        yield


shared_model = functools.cache(made)
"""Captured once. What changes are its parameters' values, on which no plan depends."""


def planned(name: str, *, batch: int = BATCH, **options: Any) -> Plan:
    model, call = shared_model(name, batch)
    options = {"devices": CPUS, "remat": "auto"} | options
    devices = options.pop("devices")
    return autopipe.plan(model, devices, options.pop("chunks", None), kwargs=call, **options)


@functools.cache
def most(name: str) -> int:
    """Bytes of the largest stage where there is no limit."""
    return max(stage.memory_bytes for stage in planned(name).stages)


@functools.cache
def under(name: str, fraction: float) -> Plan | None:
    """The plan under a limit; None: nothing fits."""
    try:
        return planned(name, memory=int(most(name) * fraction))
    except MemoryLimitError:
        return None


@functools.cache
def pipelined_under(name: str, fraction: float) -> autopipe.Pipeline:
    """A pipeline under a limit, with several micro-batches."""
    plan = under(name, fraction)
    if plan is None or len(plan.sizes) == 1:  # (see the last test)
        plan = planned(name, chunks=2, memory=int(most(name) * fraction))
    model, call = shared_model(name, BATCH)
    return autopipe.compile(model, plan=plan, kwargs=call)


def largest(plan: Plan) -> int:
    return max(stage.memory_bytes for stage in plan.stages)


@pytest.mark.full
@pytest.mark.parametrize("name", of_models(("skip",), ("shared",)))
def test_with_less_memory_no_step_is_shorter(name: str) -> None:
    found = [under(name, fraction) for fraction in FRACTIONS[name]]
    plans = [plan for plan in found if plan is not None]
    assert found == [*plans, *[None] * (len(found) - len(plans))]  # what fits fits in more, too
    assert len(plans) >= 5
    for fraction, plan in zip(FRACTIONS[name], plans, strict=False):
        assert largest(plan) <= int(most(name) * fraction)
    steps = [plan.step_seconds for plan in plans]
    assert steps == sorted(steps)
    assert len({tuple(stage.remat for stage in plan.stages) for plan in plans}) > 1
    assert steps[0] <= planned(name).step_seconds  # there is as much as that needs


@pytest.mark.parametrize(("name", "fraction"), of_models(*SMALL))
def test_no_plan_with_given_policies_and_micro_batches_is_faster(
    name: str, fraction: float
) -> None:
    limit = int(most(name) * fraction)
    best = under(name, fraction)
    others = []
    for remat in ("none", "min-cut", "full"):
        for chunks in (1, 4):
            try:
                others.append(planned(name, chunks=chunks, remat=remat, memory=limit))
            except MemoryLimitError:
                continue
    assert others
    assert best is not None
    assert all(largest(plan) <= limit for plan in others)
    assert best.step_seconds <= min(plan.step_seconds for plan in others)


def slow(monkeypatch: pytest.MonkeyPatch, stage: int | None) -> None:
    """Have a stage begin everything late, so that the other is ahead of it as far as it may be."""
    context = Run.context

    def late(self: Run, k: int, *args: Any) -> Any:
        if k == stage:
            hashlib.pbkdf2_hmac("sha256", b"some work", b"without the GIL", 10_000)
        return context(self, k, *args)

    monkeypatch.setattr(Run, "context", late)


@pytest.mark.parametrize("late", [None, 0, 1])
@pytest.mark.parametrize(("name", "fraction"), of_models(*SMALL, ("gpt2", FRACTIONS["gpt2"][2])))
def test_what_a_pipeline_takes_is_not_above_the_limit(
    name: str, fraction: float, late: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, late)
    pipe = pipelined_under(name, fraction)
    plan = pipe.plan
    model, call = shared_model(name, BATCH)
    optimizer = torch.optim.Adam(pipe.parameters())

    def step() -> None:
        result = pipe(**call)
        (result if isinstance(result, Tensor) else result.loss).backward()

    step()
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    with watching(model) as ledger:
        step()
    optimizer.zero_grad()
    for k, stage in enumerate(plan.stages):
        own = [model.get_parameter(target) for target in stage.parameters]
        state = [t for p in own for t in optimizer.state[p].values() if t.ndim]
        static = sum(t.nbytes for t in [*own, *state])
        used = static + stage.buffer_bytes + stage.shared_copy_bytes + ledger.peak[k]
        assert 0 < used <= int(most(name) * fraction)
        assert used <= stage.memory_bytes


def fits(attempt: Callable[[], Plan]) -> bool:
    try:
        attempt()
    except MemoryLimitError:
        return False
    return True


@pytest.mark.parametrize(("name", "fraction"), of_models(("skip", 0.3), ("shared", 0.65)))
def test_what_would_help_does_and_a_little_less_does_not(name: str, fraction: float) -> None:
    limit = int(most(name) * fraction)
    with pytest.raises(MemoryLimitError, match=r"stage \d does not fit its device") as error:
        planned(name, chunks=2, memory=limit)
    assert error.value.missing_bytes is not None
    assert error.value.missing_bytes > 0
    remedy = error.value.remedy or ""
    named = dict.fromkeys(("devices", "chunks", "batch"), 0)
    if found := re.search(r"chunks=(\d+)", remedy):
        named["chunks"] = chunks = int(found[1])
        assert fits(lambda: planned(name, chunks=chunks, memory=limit))
        if chunks > 4:
            assert not fits(lambda: planned(name, chunks=chunks // 2, memory=limit))
    if found := re.search(r"(\d+) devices", remedy):
        named["devices"] = count = int(found[1])
        assert fits(lambda: planned(name, devices=["cpu"] * count, chunks=2, memory=limit))
        assert not fits(
            lambda: planned(name, devices=["cpu"] * (count - 1), chunks=2, memory=limit)
        )
    if found := re.search(r"a batch of (\d+)", remedy):
        named["batch"] = batch = int(found[1])
        assert fits(lambda: planned(name, batch=batch, chunks=2, memory=limit))
        assert not fits(lambda: planned(name, batch=batch + 1, chunks=2, memory=limit))
    assert any(named.values()), remedy


@pytest.mark.full
@pytest.mark.xdist_group("search skip")
def test_stages_of_a_plan_have_policies_that_can_be_written() -> None:
    for fraction in FRACTIONS["skip"]:
        plan = under("skip", fraction)
        for stage in plan.stages if plan is not None else ():
            assert parse_policy(stage.remat) is not None


@pytest.mark.xdist_group("search shared")
def test_a_plan_that_chose_one_micro_batch_can_be_run() -> None:
    plan = planned("shared", memory=int(most("shared") * 0.92))
    assert len(plan.sizes) == 1
    model, call = shared_model("shared", BATCH)
    autopipe.compile(model, plan=plan, kwargs=call)


# ------------------------------------------------------------------------------- batch norm


def normalised(image: bool, mode: str = "train") -> nn.Module:
    """Layers so large that many micro-batches are worth it."""
    if image:
        parts: list[nn.Module] = [nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32)]
    else:
        shape = 32, 16, 16
        own = [nn.Flatten(), nn.BatchNorm1d(math.prod(shape)), nn.Unflatten(1, shape)]
        parts = [nn.Conv2d(32, 32, 3, padding=1), *own]
    model = nn.Sequential(*[copy.deepcopy(m) for _ in range(4) for m in parts])
    return model.train(mode == "train")


@pytest.mark.parametrize("image", [True, False], ids=["image", "vector"])
def test_the_planner_gives_batch_norm_samples(image: bool) -> None:
    x = torch.ones(*((32, 32, 32, 32) if image else (32, 32, 16, 16)), device="meta")
    plans = {
        mode: autopipe.plan(
            normalised(image, mode).to("meta"), 4, None, args=(x,), device="cpu-core"
        )
        for mode in ("train", "eval")
    }
    assert min(plans["train"].sizes) == NORMALISED_TOGETHER
    assert min(plans["eval"].sizes) < NORMALISED_TOGETHER, "the same model without statistics"


def test_memory_counts_more_than_samples_for_batch_norm() -> None:
    """Where only small micro-batches fit, they are planned."""
    model, x = normalised(image=True).to("meta"), torch.ones(32, 32, 32, 32, device="meta")
    most, least = (autopipe.plan(model, 2, chunks, args=(x,)) for chunks in (4, 16))
    limit = max(s.memory_bytes for s in least.stages)
    assert limit < max(s.memory_bytes for s in most.stages)
    plan = autopipe.plan(model, 2, None, args=(x,), memory=limit)
    assert max(s.memory_bytes for s in plan.stages) <= limit
    assert min(plan.sizes) < NORMALISED_TOGETHER


def test_a_small_batch_is_planned_whole() -> None:
    model, x = normalised(image=False), torch.randn(3, 32, 16, 16)
    assert autopipe.plan(model, 2, None, args=(x,)).sizes == (3,)
