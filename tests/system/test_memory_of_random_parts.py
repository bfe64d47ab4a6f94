"""Random programs, parts of tensors between stages: planned bytes are the measured ones.

Parts are of activations, of the caller's batch, of parameters and buffers, one parameter frozen.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import autopipe

WIDTH, LENGTH, BATCH, CHUNKS = 8, 4, 8, 4


class Program(nn.Module):
    """Four layers with random ops after each, which use earlier values again.

    Args:
        seed: of the ops.
    """

    table: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.ops = [[draw.random() for _ in range(2 * draw.randint(1, 4))] for _ in range(4)]
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in self.ops)
        self.positions = nn.Parameter(torch.randn(20, WIDTH))
        self.frozen = nn.Parameter(torch.randn(LENGTH, WIDTH), requires_grad=False)
        self.register_buffer("table", torch.randn(20, 2 * WIDTH))

    def forward(self, x: Tensor, pair: Tensor) -> Tensor:
        values = [
            x,
            *pair.chunk(2, -1),
            self.positions[2 : 2 + LENGTH],
            self.positions[5].expand(LENGTH, WIDTH),
            self.frozen,
            *self.table[:LENGTH].chunk(2, -1),
        ]
        h = x
        for layer, ops in zip(self.layers, self.ops, strict=True):
            h = layer(h)
            for op, which in zip(ops[::2], ops[1::2], strict=True):
                h = self.applied(int(op * 9), h, values[int(which * len(values))], values)
        return h.square().mean()

    def applied(self, op: int, h: Tensor, value: Tensor, values: list[Tensor]) -> Tensor:
        """The next value; may add to those that later ops use."""
        if op == 0:
            return h.tanh()
        if op == 1:
            return h * value
        if op == 2:
            return h + value
        if op == 3:
            return torch.where(value > 0, h, value)
        if op == 4:
            return torch.stack(h.unbind(1), 1)
        if op == 5:
            values.append(h.mT.contiguous().mT)
            return values[-1]
        if op == 6:
            values.append(h.flip(1)[:, :1].expand(-1, LENGTH, -1))
            return h
        if op == 7:
            part, h = torch.cat([h, h.sin()], -1).chunk(2, -1)
        else:
            h, part = torch.cat([h, value.expand_as(h)], 1).chunk(2, 1)
        values.append(part)
        return h


@pytest.mark.few(4)
@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1", "zb-v"])
@pytest.mark.parametrize("remat", ["none", "full", "min-cut"])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_saved_is_what_was_planned(seed: int, remat: str, schedule: str) -> None:
    torch.manual_seed(seed)
    stages = 4 if schedule == "zb-v" else 3
    pipe = autopipe.compile(
        Program(seed),
        devices=["cpu"] * (2 if schedule == "zb-v" else 3),
        chunks=CHUNKS,
        cut_at=[f"layers.{k}" for k in range(1, stages)],
        remat=remat,
        schedule=schedule,  # type: ignore[arg-type]
    )
    rows = torch.randn(BATCH, LENGTH, 3 * WIDTH)
    pipe(rows[..., :WIDTH], rows[..., WIDTH:]).backward()
    plan, memory = pipe.plan, pipe.memory
    assert [s.peak for s in memory.stages] == [s.peak_saved_bytes for s in plan.stages]
    assert [d.peak for d in memory.devices] == [t.peak_saved_bytes for t in plan.totals]
