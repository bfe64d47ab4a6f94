"""Micro-batches of one sample: bit for bit, wherever a model is cut.

The stride of a dimension with one entry is arbitrary, but not to a kernel that asks a tensor for
its memory format. What a stage receives must have the strides that eager has there, and what was
traced must have been decided by them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import autopipe
from autopipe.call_signature import flatten
from autopipe.errors import PlanError
from tests.support.models import MODELS
from tests.support.once import pure_passes_once
from tests.support.reference import Truth, objective, over_chunks

pytestmark = pytest.mark.few(1)

SAMPLES = 2


@pytest.fixture(scope="module", autouse=True)
def _once() -> Iterator[None]:
    with pure_passes_once():
        yield


class UNet(nn.Module):
    """A small one, with attention over pixels, whose results are views back to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.groups, self.batch = nn.GroupNorm(2, 8), nn.BatchNorm2d(8)
        self.query, self.key, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.also_up = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(x)
        low = F.silu(self.down(wide))
        pixels = self.groups(low).flatten(2).transpose(1, 2)
        weights = (self.query(pixels) @ self.key(pixels).transpose(1, 2)).softmax(-1)
        pixels = self.out(weights @ pixels)
        image = pixels.transpose(1, 2).reshape(low.shape) + low
        image = torch.cat([self.batch(self.middle(image)), low], 1)
        image = F.relu(self.up(F.interpolate(image, scale_factor=2.0)))
        blurred = pixels.transpose(1, 2).view(low.shape)
        blurred = F.interpolate(blurred, scale_factor=2.0, mode="bilinear")
        return self.last(torch.cat([self.also_up(blurred) + image, wide], 1))


def small() -> Any:
    torch.manual_seed(0)
    return UNet(), lambda batch: ((torch.randn(batch, 3, 16, 16),), {})


class Rolled(nn.Module):
    """torch believes that what is rolled is contiguous; it has the layout that it had."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).contiguous(memory_format=torch.channels_last).roll(1, 2)
        return self.last(x.relu())


def rolled() -> Any:
    torch.manual_seed(0)
    return Rolled(), lambda batch: ((torch.randn(batch, 3, 16, 16),), {})


def assert_equal(pipe: autopipe.Pipeline, model: nn.Module, args: Any, truth: Truth) -> None:
    """A step of the pipeline; the model's buffers stay as they were."""
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.zero_grad()
    result = pipe(*args)
    objective(result).backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, truth.buffers[name]), name
        buffer.data.copy_(before[name])
    pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(truth.result), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for name, gradient in truth.parameters.items():
        found = model.get_parameter(name).grad
        assert torch.equal(found, gradient) if gradient is not None else found is None, name


# Of the U-Net of the tests every fortieth position: to trace all takes minutes.
@pytest.mark.parametrize(
    ("make", "step", "remat", "least"),
    [
        (rolled, 1, "none", 3),
        (small, 1, "none", 30),
        (small, 3, "full", 10),
        (MODELS["unet"].make, 40, "none", 5),
    ],
    ids=["rolled", "small", "small, recomputed", "unet"],
)
def test_any_cut(make: Any, step: int, remat: str, least: int) -> None:
    model, inputs = make()
    args = inputs(SAMPLES)[0]
    plan = autopipe.plan(model, ["cpu"] * 2, SAMPLES, remat=remat, args=args)
    pipe = autopipe.compile(model, plan=plan, args=args)
    truth = over_chunks(pipe.captured, model, flatten(args, {})[0], SAMPLES)
    calls = [n.name for n in pipe.captured.graph_module.graph.nodes if n.op == "call_function"]
    tried = []
    for name in calls[1::step]:
        last = dataclasses.replace(plan.stages[1], first=name)
        cut = dataclasses.replace(plan, stages=(plan.stages[0], last))
        try:
            pipe = autopipe.compile(model, plan=cut, args=args)
        except PlanError:  # no stage may start there
            continue
        assert_equal(pipe, model, args, truth)
        tried.append(name)
    assert len(tried) >= least


class Pixels(nn.Module):
    """A sequence made an image: its strides are those of a view, and `last` goes by them."""

    def __init__(self, last: str, dims: int) -> None:
        super().__init__()
        self.sizes = (8,) * dims if dims == 2 else (4,) * dims
        self.layer, self.norm = nn.Linear(8, 8), nn.GroupNorm(2, 8)
        self.conv = (nn.Conv2d if dims == 2 else nn.Conv3d)(8, 8, 3, padding=1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).transpose(1, 2)
        x = x.view(x.shape[0], 8, *self.sizes)
        if self.last == "norm":
            return self.norm(x)
        if self.last == "norm of a product":
            return self.conv(self.norm(x * 2))
        x = F.interpolate(x, scale_factor=2.0)
        if self.last == "view":
            return self.conv(x.view(x.shape[0], 8, -1).tanh().view(x.shape))
        if self.last == "layout":
            return self.conv(x.contiguous(memory_format=torch.channels_last))
        if self.last == "product":
            return (x.flatten(2).transpose(1, 2) @ self.layer.weight).relu()
        return self.conv(x)


LASTS = ("norm", "norm of a product", "view", "layout", "product", "convolution")


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("last", "dims"), [(n, d) for n in LASTS for d in (2, 3) if (n, d) != ("layout", 3)]
)
def test_an_image_made_by_a_view(last: str, dims: int, devices: int) -> None:
    """Traced with other strides than the view's own, kernels were chosen that eager does not take,
    and a group norm over three dimensions refused its argument."""
    torch.manual_seed(0)
    model, args = Pixels(last, dims), (torch.randn(3, 64, 8),)
    pipe = autopipe.compile(model, ["cpu"] * devices, 3, args=args)
    assert_equal(pipe, model, args, over_chunks(pipe.captured, model, [*args], 3))
