"""Promises 1, 2 and 3: the same module, the same numbers, the same randomness.

Truth is the captured graph under plain autograd over the same chunks
(`tests.support.reference`), compared
bit for bit, and the model itself in eager torch, compared to rounding.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autopipe
from autopipe.call_signature import flatten
from autopipe.runtime.random import step_seed
from tests.support.models import MODELS
from tests.support.once import pure_passes_once
from tests.support.reference import Truth, objective, over_chunks
from tests.support.tiers import full_unless

CHUNKS, REMATS = (1, 3, 4), ("none", "full", "min-cut")
BATCHES = {1: (2, 3), 3: (4, 7), 4: (4, 7)}
"""Sizes of batches, by the number of micro-batches: those are of one, two or three samples."""
ROUNDING = 2e-6  # of a gradient's own norm per element: promise 2


@pytest.fixture(scope="module", autouse=True)
def _once():
    with pure_passes_once():
        yield


@functools.cache
def _model(name: str) -> Any:
    return MODELS[name].make()


@functools.cache
def _truth(name: str, captured: Any, batch: int, chunks: int, seed: int | None = None) -> Truth:
    model, inputs = _model(name)
    return over_chunks(captured, model, flatten(*inputs(batch))[0], chunks, seed=seed)


@functools.cache
def _eager(name: str, batch: int) -> tuple[Any, dict[str, Tensor | None]]:
    """The model itself, whole batch at once."""
    model, inputs = _model(name)
    model = copy.deepcopy(model)
    args, kwargs = inputs(batch)
    result = model(*args, **kwargs)
    objective(result).backward()
    return result, {n: p.grad for n, p in model.named_parameters()}


def _run(pipe: autopipe.Pipeline, model: nn.Module, inputs: Any, batch: int) -> Truth:
    """A training step; the model's buffers are put back, since `_truth` starts from them."""
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.zero_grad()
    args, kwargs = inputs(batch)
    result = pipe(*args, **kwargs)
    objective(result).backward()
    found = Truth(
        result,
        {n: p.grad for n, p in model.named_parameters()},
        [x.grad for x in flatten(args, kwargs)[0] if x.requires_grad],
        {n: b.clone() for n, b in model.named_buffers()},
    )
    with torch.no_grad():
        for n, b in model.named_buffers():
            b.copy_(before[n])
    return found


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return a == b


def _assert_same(found: Truth, truth: Truth) -> None:
    pairs = zip(pytree.tree_leaves(found.result), pytree.tree_leaves(truth.result), strict=True)
    assert [i for i, (a, b) in enumerate(pairs) if not _equal(a, b)] == []
    for name, gradient in truth.parameters.items():
        assert _equal(found.parameters[name], gradient), name
    assert all(_equal(a, b) for a, b in zip(found.inputs, truth.inputs, strict=True))
    for name, buffer in truth.buffers.items():
        assert _equal(found.buffers[name], buffer), name


def _each(names: list[str]) -> Any:
    """One group per model, so that parallel workers each trace their own models only."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in names]
    )


EXACT = [n for n, e in MODELS.items() if not e.random]
STAGES = (1, 2, 3, 4)
SLOW = ("unet", "transformer", "t5", "bert", "resnet", "gpt2")
"""Of these not every combination is run, but every pair of a number of stages or a policy and a
number of micro-batches, in a batch of one size; all with ``AUTOPIPE_ALL=1``."""


def _combinations() -> Any:
    """In the first tier: of the slow models one, of each other one combination, and among them each
    number of stages and each policy."""
    quick = {(n, 1 + i % 4, REMATS[i % 3]) for i, n in enumerate(EXACT) if n not in SLOW}
    quick.add((SLOW[-1], 3, "full"))
    return pytest.mark.parametrize(
        ("name", "devices", "remat"),
        [
            pytest.param(
                *case,
                marks=[
                    pytest.mark.xdist_group(case[0]),
                    *full_unless(case in quick),
                ],
            )
            for case in itertools.product(EXACT, STAGES, REMATS)
        ],
    )


def _splits(name: str, devices: int, remat: str) -> list[tuple[int, tuple[int, ...]]]:
    """Numbers of micro-batches, each with the sizes of its batches."""
    if name not in SLOW or os.environ.get("AUTOPIPE_ALL"):
        return list(BATCHES.items())
    chunks = CHUNKS[(devices + REMATS.index(remat)) % len(CHUNKS)]
    return [(chunks, (BATCHES[chunks][devices % 2],))]


def test_slow_models_too_meet_every_pair() -> None:
    met = [
        (k, r, c, b)
        for k, r in itertools.product(STAGES, REMATS)
        for c, batches in _splits(SLOW[0], k, r)
        for b in batches
    ]
    assert {(k, c) for k, _, c, _ in met} == set(itertools.product(STAGES, CHUNKS))
    assert {(r, c) for _, r, c, _ in met} == set(itertools.product(REMATS, CHUNKS))
    assert {(c, b) for _, _, c, b in met} == {(c, b) for c in CHUNKS for b in BATCHES[c]}
    uneven = {(r, b % c > 0) for _, r, c, b in met}
    assert uneven == set(itertools.product(REMATS, (True, False)))


@_combinations()
def test_bit_equal_to_the_captured_graph(name: str, devices: int, remat: str) -> None:
    model, inputs = _model(name)
    for chunks, batches in _splits(name, devices, remat):
        pipe = autopipe.compile(model, devices=devices, chunks=chunks, remat=remat)
        for batch in batches:
            found = _run(pipe, model, inputs, batch)
            _assert_same(found, _truth(name, pipe.captured, batch, chunks))


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        pytest.param(
            n,
            c,
            marks=[pytest.mark.xdist_group(n), *full_unless(c == 3 and n not in SLOW[:-1])],
        )
        for n, c in itertools.product(EXACT, CHUNKS)
        if n != "resnet"
    ],
)
def test_equal_to_the_model_itself(name: str, chunks: int) -> None:
    model, inputs = _model(name)
    pipe = autopipe.compile(model, devices=3, chunks=chunks)
    batch = BATCHES[chunks][-1]
    found = _run(pipe, model, inputs, batch)
    result, gradients = _eager(name, batch)
    for a, b in zip(pytree.tree_leaves(found.result), pytree.tree_leaves(result), strict=False):
        if isinstance(b, Tensor):
            assert (a - b).abs().max() <= ROUNDING * max(1.0, b.abs().max().item())
    scale = max(g.abs().max() for g in gradients.values() if g is not None)
    for key, gradient in gradients.items():
        if gradient is not None:
            assert (found.parameters[key] - gradient).abs().max() <= ROUNDING * scale, key


@pytest.mark.few(1)
@pytest.mark.parametrize(("chunks", "batch", "stages"), [(4, 4, (1, 3)), (3, 10, STAGES)])
@_each([n for n, e in MODELS.items() if e.random])
def test_randomness_does_not_depend_on_the_plan(
    name: str, chunks: int, batch: int, stages: tuple[int, ...]
) -> None:
    """It is that of the captured graph, in which each number is drawn by its key."""
    model, inputs = _model(name)
    torch.manual_seed(7)
    seed = step_seed()
    for devices in stages:
        remats = REMATS if devices == 3 else REMATS[devices % 3 :][:1]
        for remat in remats:
            pipe = autopipe.compile(model, devices=devices, chunks=chunks, remat=remat)
            torch.manual_seed(7)
            found = _run(pipe, model, inputs, batch)
            _assert_same(found, _truth(name, pipe.captured, batch, chunks, seed))
    torch.manual_seed(8)
    other = _run(pipe, model, inputs, batch)
    assert not torch.equal(objective(other.result), objective(found.result))
