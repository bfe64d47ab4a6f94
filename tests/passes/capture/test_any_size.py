"""Functions that would fix a size, in models whose batch and length change."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import CaptureError
from autopipe.passes.capture.any_size import keep_sizes_symbolic

WIDTH = 8

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pool": lambda x: F.max_pool1d(x.mT, 2).mT,
    "pool with strides": lambda x: torch.max_pool1d(x.mT, [3], [2], 1, 1, True).mT,
    "pool, all named": lambda x: F.max_pool1d(x.mT, kernel_size=2, stride=1, dilation=2).mT,
    "take": lambda x: x.take_along_dim(x.argsort(1), 1),
    "take some": lambda x: torch.take_along_dim(x, x.argmax(-2, keepdim=True), dim=-2),
    "take all along another": lambda x: torch.take_along_dim(
        x.mean(1, keepdim=True), x.argsort(-1)[:, :, :3], 2
    ),
    "take from a flat one": lambda x: x * torch.take_along_dim(x[0], torch.tensor([0, 3])).sum(),
}


class Around(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "flat" not in n])
def test_one_capture_serves_all_sizes(name: str) -> None:
    torch.manual_seed(0)
    model = Around(FUNCTIONS[name]).double()
    model(torch.randn(2, 9, WIDTH, dtype=torch.float64))
    pipe = autopipe.compile(model, devices=2, chunks=2, dynamic={"x": {1: "length"}})
    for samples, length in ((4, 9), (6, 12), (3, 7)):
        x = torch.randn(samples, length, WIDTH, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="each new size|dimension")
            found = pipe(x)
        expected = model(x)
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            torch.autograd.grad(found.square().sum(), list(model.parameters())),
            torch.autograd.grad(expected.square().sum(), list(model.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    apart = torch.__version__ < "2.13" and name in ("pool", "pool with strides")
    assert (
        autopipe.explain_captures(pipe).count == 1 + apart
    )  # odd and even lengths before torch 2.13


def test_what_mixes_samples_is_refused() -> None:
    model = Around(FUNCTIONS["take from a flat one"])
    x = torch.randn(4, 9, WIDTH)
    model(x)
    with pytest.raises((CaptureError, autopipe.errors.CouplingError)):
        autopipe.compile(model, devices=2, chunks=2)(x)


@pytest.mark.parametrize("dim", [3, -4])
def test_mistakes_are_those_of_torch(dim: int) -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(IndexError) as expected:
        torch.take_along_dim(x, x.argsort(1), dim)
    with keep_sizes_symbolic(), pytest.raises(IndexError) as found:
        x.take_along_dim(x.argsort(1), dim)
    assert str(found.value) == str(expected.value)
