"""Upsampling of images whose sizes change: stages are traced once for all sizes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe import traced_stages
from autopipe.passes.phases.upsample_sizes import with_output_size
from tests.support.agreement import assert_close as close_to

aten = torch.ops.aten


class Upsampler(nn.Module):
    def __init__(self, dims: int, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given
        self.first, self.last = ((nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 2, 1) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        given = dict(self.given)
        if given.pop("twice", False):
            given["size"] = [2 * n for n in x.shape[2:]]
        return self.last(F.interpolate(self.first(x), **given)).square()


@pytest.mark.parametrize(
    ("dims", "given"),
    [
        (1, {"scale_factor": 2}),
        (2, {"scale_factor": 2.0}),
        (3, {"scale_factor": 2.0}),
        (2, {"scale_factor": (2, 3)}),
        (2, {"scale_factor": 2.0, "recompute_scale_factor": True}),
        (2, {"twice": True}),
        (2, {"scale_factor": 2.0, "mode": "nearest-exact"}),
        (1, {"scale_factor": 2.0, "mode": "linear"}),
        (2, {"scale_factor": 0.5, "mode": "bilinear", "align_corners": False}),
        (2, {"scale_factor": 1.5, "mode": "bilinear", "align_corners": True}),
        (2, {"scale_factor": 0.5, "mode": "bilinear", "antialias": True}),
        (2, {"scale_factor": 2.0, "mode": "bicubic"}),
        (3, {"twice": True, "mode": "trilinear"}),
    ],
)
def test_one_trace_serves_all_sizes(
    dims: int, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = []
    phases = traced_stages.phases_by_size

    def counted(request: Any, *args: Any) -> Any:
        traces.append(request)
        return phases(request, *args)

    monkeypatch.setattr(traced_stages, "phases_by_size", counted)
    torch.manual_seed(0)
    model = Upsampler(dims, given).double()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    for size in (8, 12, 6, 7, 20):
        x = torch.randn(4, 2, *[size] * dims, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="each new size")
            found = pipe(x)
        expected = model(x)
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            torch.autograd.grad(found.sum(), list(model.parameters())),
            torch.autograd.grad(expected.sum(), list(model.parameters())),
            strict=True,
        ):
            close_to(a, b)
    assert len(traces) == 2


def test_other_calls_stay_as_they_are() -> None:
    x = torch.randn(1, 1, 4, 4)
    for target, args in (
        (aten.upsample_nearest2d.vec, (x, None, [2.0, 2.0])),
        (aten.upsample_nearest2d.default, (x, [8, 8])),
        (aten.add.Tensor, (x, x)),
        (torch.sin, (x,)),
    ):
        assert with_output_size(target, args, {}) == (target, args, {})
