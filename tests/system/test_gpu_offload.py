"""Offloading on a GPU: the bits of remat "none", and memory that is free meanwhile."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import autopipe

pytestmark = pytest.mark.gpu
STEPS, CHUNKS, WIDTH = 3, 8, 1024


def run(remat: str, devices: int, schedule: str) -> tuple[list[Tensor], int]:
    """What all steps give, and the most bytes that were allocated in the last."""
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    model = nn.Sequential(*layers, nn.Dropout(0.1)).cuda()
    pipe = autopipe.compile(
        model,
        ["cuda:0"] * devices,
        CHUNKS,
        remat=remat,
        schedule=schedule,
        loss_fn=lambda out, target: (out - target).square().mean(),
    )
    found: list[Tensor] = []
    for n in range(STEPS):
        torch.manual_seed(n)
        x = torch.randn(CHUNKS * 1024, WIDTH, device="cuda:0")
        model.zero_grad()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found.append(pipe.step(x, target=x).detach())
        torch.cuda.synchronize()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_bits_of_remat_none(schedule: str, devices: int) -> None:
    truth, most = run("none", devices, schedule)
    found, least = run("offload", devices, schedule)
    for ours, expected in zip(found, truth, strict=True):
        assert torch.equal(ours, expected)
    if (schedule, devices) == ("gpipe", 1):
        assert least < 0.7 * most
