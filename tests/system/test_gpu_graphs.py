"""CUDA graphs on a GPU: the bits of the eager backend, step after step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autopipe
from tests.support.models import MODELS
from tests.support.reference import objective

pytestmark = pytest.mark.gpu
STEPS = 4
"""The first runs eagerly, the second captures, two replay."""


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(inputs: Any) -> Any:
    return pytree.tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, inputs)


def steps(name: str, backend: Any, devices: int, **options: Any) -> tuple[list[Tensor], str]:
    """What all steps give, with an optimizer between them; and what `explain` says."""
    torch.manual_seed(0)
    model, inputs = MODELS[name].make()
    model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    pipe = autopipe.compile(model, ["cuda:0"] * devices, 2, backend=backend, **options)
    found: list[Tensor] = []
    for n in range(STEPS):
        torch.manual_seed(n)
        args, kwargs = on_gpu(inputs(4))
        loss = objective(pipe(*args, **kwargs))
        loss.backward()
        found += [
            loss.detach(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]
        found += [b.clone() for b in model.buffers()]
        optimizer.step()
        optimizer.zero_grad()
    return found, pipe.explain()


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_bits_of_the_eager_backend(name: str, devices: int, remat: str) -> None:
    truth, _ = steps(name, "eager", devices, remat=remat)
    found, text = steps(name, "cudagraphs", devices, remat=remat)
    for ours, expected in zip(found, truth, strict=True):
        assert torch.equal(ours, expected)
    print(name, [line for line in text.splitlines() if line.startswith("runs eagerly")])


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved"])
def test_schedules(schedule: str) -> None:
    truth, _ = steps("gpt2_dropout", "eager", 2, schedule=schedule)
    found, text = steps("gpt2_dropout", "cudagraphs", 2, schedule=schedule)
    for ours, expected in zip(found, truth, strict=True):
        assert torch.equal(ours, expected)
    assert "runs eagerly" not in text


def test_memory_does_not_grow() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).cuda()
    pipe = autopipe.compile(model, ["cuda:0"] * 2, 4, backend="cudagraphs")
    x = torch.randn(64, 256, device="cuda:0")
    used = []
    for n in range(12):
        model.zero_grad()
        pipe(x).square().mean().backward()
        if n in (3, 11):
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    assert used[0] == used[1]
