"""What stages keep between forward and backward, counted by the runtime, and that it goes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from tests.support.models import MODELS, gpt2, resnet
from tests.support.reference import objective

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]


def _loss(result: Any) -> Tensor:
    return result.loss if hasattr(result, "loss") else result.sum()


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_full_keeps_only_what_was_received(devices: int) -> None:
    model, inputs = gpt2(layers=3)
    pipe = autopipe.compile(model, devices, 4, remat="full")
    _, kwargs = inputs(8)
    loss = pipe(**kwargs).loss
    for stage, counted in zip(pipe.stages, pipe.memory.stages, strict=True):
        saved = counted.per_microbatch[2]
        assert 0 < saved <= received_bytes(stage, 2)
        assert counted.now == 4 * saved, "four micro-batches are in flight after the forward"
    loss.backward()
    assert [s.now for s in pipe.memory.stages] == [0] * devices


def received_bytes(stage: Any, batch: int) -> int:
    """Bytes of a stage's boundary inputs for one micro-batch, from their formulas."""
    return sum(int(b.nbytes.subs("B", batch)) for b in stage.inputs if b.kind != "parameter")


@pytest.mark.parametrize("name", ["t5", *(name for name in MODELS if name != "t5")])
def test_what_is_kept_is_what_was_planned(name: str) -> None:
    """Read off the joint graphs, before anything runs: per micro-batch and at the peak."""
    model, inputs = MODELS[name].make()
    args, kwargs = inputs(5)
    kwargs = {n: x.clone() if isinstance(x, Tensor) else x for n, x in kwargs.items()}
    for remat in ("full", "none", "min-cut", 0.5):
        plan = autopipe.plan(model, ["cpu"] * 2, 3, remat=remat, args=args, kwargs=kwargs)
        pipe = autopipe.compile(model, plan=plan)
        objective(pipe(*args, **kwargs)).backward()
        for planned, counted in zip(plan.stages, pipe.memory.stages, strict=True):
            assert planned.saved_bytes == counted.per_microbatch[2] > 0
            assert planned.peak_saved_bytes == counted.peak
        assert pipe.plan == plan


@pytest.mark.full
def test_full_keeps_least_and_none_most() -> None:
    peaks = {}
    for remat in ("none", "min-cut", "full"):
        model, inputs = gpt2(layers=3)
        pipe = autopipe.compile(model, 2, 4, remat=remat)
        pipe(**inputs(8)[1]).loss.backward()
        peaks[remat] = [s.peak for s in pipe.memory.stages]
    for full, cut, none in zip(peaks["full"], peaks["min-cut"], peaks["none"], strict=True):
        assert full < cut <= none


def test_saved_bytes_against_a_count_by_hand() -> None:
    """Two layers, one stage: remat none keeps x, tanh's result and nothing else."""
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 30))
    pipe = autopipe.compile(model, 1, 2, remat="none")
    pipe(torch.randn(8, 10)).sum().backward()
    assert pipe.memory.stages[0].per_microbatch == {4: (4 * 10 + 4 * 20) * 4}
    assert pipe.memory.stages[0].peak == 2 * (4 * 10 + 4 * 20) * 4


def test_batch_norm_under_full_adds_only_its_statistics() -> None:
    model, inputs = resnet()
    pipe = autopipe.compile(model, 2, 2, remat="full")
    pipe(**inputs(8)[1]).loss.backward()
    statistics = sum(b.numel() * 8 for b in model.buffers())  # bytes, each as if it were int64
    for stage, counted in zip(pipe.stages, pipe.memory.stages, strict=True):
        assert counted.per_microbatch[4] <= received_bytes(stage, 4) + statistics


@pytest.mark.parametrize("remat", ["none", "full", "min-cut"])
def test_nothing_is_left_after_backward(remat: str) -> None:
    model, inputs = gpt2()
    pipe = autopipe.compile(model, 2, 3, remat=remat)
    pipe(**inputs(6)[1]).loss.backward()
    model.zero_grad()
    gc.collect()
    before = {id(o) for o in gc.get_objects() if issubclass(type(o), Tensor)}
    result = pipe(**inputs(6)[1])
    inside = [
        weakref.ref(o)
        for o in gc.get_objects()
        if issubclass(type(o), Tensor) and id(o) not in before
    ]
    assert len(inside) > 5, "saved values live here"
    result.loss.backward()
    model.zero_grad()
    del result
    gc.collect()
    assert [r() for r in inside if r() is not None] == []


@pytest.mark.full
def test_a_forward_without_backward_lets_go() -> None:
    model, inputs = gpt2()
    pipe = autopipe.compile(model, 2, 3)
    result = pipe(**inputs(6)[1])
    assert all(s.now > 0 for s in pipe.memory.stages)
    del result
    gc.collect()
    assert all(s.now == 0 for s in pipe.memory.stages)


def test_fifty_steps_without_growth() -> None:
    model, inputs = gpt2()
    pipe = autopipe.compile(model, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    counts, peaks = [], []
    for step in range(52):
        pipe(**inputs(6)[1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 51):
            gc.collect()
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
            peaks.append([s.peak for s in pipe.memory.stages])
    assert counts[0] == counts[1]
    assert peaks[0] == peaks[1]


def test_inference_keeps_nothing() -> None:
    model, inputs = gpt2()
    pipe = autopipe.compile(model, 2, 3)
    with torch.no_grad():
        assert not _loss(pipe(**inputs(6)[1])).requires_grad
    assert [s.peak for s in pipe.memory.stages] == [0, 0]
