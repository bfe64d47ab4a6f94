"""No false waits: on simulated devices a step takes as long as its computations allow.

    pytest -s -m "full or not full" tests/system/test_simulated_makespan.py    prints the times

Every matrix product takes a second of virtual time, a copy none or a part of one. Of K stages that
take f(k) seconds for a micro-batch, M micro-batches take at least sum f + (M - 1) max f seconds in
one direction (GPipe, arXiv 1811.06965, section 2.3, without the stages being equal).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from tests.support.simulated import Machine, simulated

aten = torch.ops.aten
PRODUCTS = (aten.addmm.default, aten.mm.default)
K, M, WIDTH = 8, 16, 8


class Layers(nn.Module):
    """A chain; all layers may read a mask, the last one the first one's result."""

    def __init__(self, layers: int, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.kind = kind

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        values = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            x = x * mask if self.kind == "mask" else x
            values.append(x)
        x = values[0] + x if self.kind == "skip" else x
        return x * mask


def limit(machine: Machine, pipe: autopipe.Pipeline, copies: float) -> float:
    """The least time of one direction, by how long each stage's stream was busy."""
    _, ready = pipe._programs.last
    stages = [worker.compute.busy / M for worker in ready.program.workers]
    assert sum(stages) >= K
    return float(sum(stages) + (M - 1) * max(stages) + (K - 1) * copies)


@pytest.mark.parametrize("copies", [0.0, 0.5])
@pytest.mark.parametrize("place", ["cpu", "lazy:0"])
@pytest.mark.parametrize("kind", ["chain", "mask", "skip"])
@pytest.mark.few(3)
def test_streams_wait_for_nothing_else(
    kind: str, place: str, copies: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(op: Any, device: torch.device) -> float:
        return 1.0 if op in PRODUCTS else copies if op is aten._to_copy.default else 0.0

    with simulated(monkeypatch, K, cost) as machine:
        torch.manual_seed(0)
        pipe = autopipe.compile(Layers(4 * K, kind), list(machine.devices), M, remat="none")
        x, mask = (t.to(place) for t in (torch.randn(2 * M, WIDTH), torch.ones(2 * M, WIDTH)))
        pipe(x, mask).sum().backward()
        machine.rest()
        result = pipe(x, mask)
        check(machine, pipe, f"{kind}, inputs on {place}, forward", copies)
        machine.rest()
        result.sum().backward()
        check(machine, pipe, f"{kind}, inputs on {place}, backward", copies)
        assert machine.races == []


def check(machine: Machine, pipe: autopipe.Pipeline, what: str, copies: float) -> None:
    """It took no longer than the limit allows; the first copy is hidden by nothing."""
    took, least = machine.makespan, limit(machine, pipe, copies)
    print(f"{what}, copies {copies}: {took:g} of {least:g} ({took / least:.3f})")
    assert least <= took <= 1.03 * least + copies
