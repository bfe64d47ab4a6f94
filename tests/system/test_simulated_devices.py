"""Steps on simulated devices: right numbers, and no access that nothing orders.

Covers the runtime's streams, events and copies; see `tests.support.simulated`. The truth is the
same pipeline on CPU workers.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import autopipe
from tests.support.simulated import Machine, SimulatedTensor, pinned, simulated
from tests.support.simulated.nets import NETS

BATCH, WIDTH, CHUNKS = 8, 8, 4
DEVICES = {"one": (0,), "one twice": (0, 0), "two": (0, 1), "four": (0, 1, 2, 3)}
PLACES = ("cpu", "pinned", "lazy:0", "lazy:5")
"""Where the caller's tensors are; the last is no stage's device."""


def host(tensor: Tensor | None) -> Tensor:
    """The values of a tensor on a simulated device."""
    assert tensor is not None
    return (tensor.values if isinstance(tensor, SimulatedTensor) else tensor).detach()


def placed(machine: Machine, tensor: Tensor, place: str) -> Tensor:
    """A copy of a tensor where the caller has it."""
    if place == "pinned":
        return pinned(machine, tensor)
    return tensor.clone() if place == "cpu" else tensor.to(place)


def total(result: Any) -> Tensor:
    """One number of a net's result."""
    values = result if isinstance(result, tuple) else (result,)
    return torch.stack([v.sum() for v in values]).sum()


def steps(
    machine: Machine, name: str, devices: tuple[int, ...], place: str, **options: Any
) -> list[tuple[str, Tensor, Tensor]]:
    """Two training steps on simulated devices and on CPU workers: what, found, expected."""
    pipes, optimizers = [], []
    for workers in (["cpu"] * len(devices), [machine.devices[k] for k in devices]):
        torch.manual_seed(0)
        net = NETS[name](WIDTH)
        optimizers.append(torch.optim.SGD(net.parameters(), 0.1))
        pipes.append(autopipe.compile(net, workers, CHUNKS, **options))
    found: list[tuple[str, Tensor, Tensor]] = []
    for step in range(2):
        x, mask = torch.randn(BATCH, WIDTH), (torch.rand(BATCH, WIDTH) > 0.3).float()
        ours = [placed(machine, t, place) for t in (x, mask)]
        for tensor in (x, ours[0]):
            tensor.requires_grad_()
        results = []
        for pipe, args in zip(pipes, ((x, mask), ours), strict=True):
            torch.manual_seed(step)  # of dropout
            results.append(total(pipe(*args)))
            results[-1].backward()
        found.append((f"loss {step}", host(results[1]), results[0].detach()))
        found.append((f"gradient of x {step}", host(ours[0].grad), host(x.grad)))
        for (parameter, a), b in zip(
            pipes[1].named_parameters(), pipes[0].parameters(), strict=True
        ):
            found.append((f"gradient of {parameter} {step}", host(a.grad), host(b.grad)))
        with torch.no_grad():
            for tensor in ours:  # the caller uses them for something else
                tensor.zero_()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (buffer, a), b in zip(pipes[1].named_buffers(), pipes[0].buffers(), strict=True):
        found.append((f"buffer {buffer}", host(a), b))
    return found


def check(machine: Machine, found: list[tuple[str, Tensor, Tensor]]) -> None:
    """Values agree, and everything was ordered, frees included."""
    for what, ours, expected in found:
        torch.testing.assert_close(ours, expected, msg=lambda m, what=what: f"{what}: {m}")
    gc.collect()
    assert machine.races == []
    assert machine.counts["kernels"] > 0


@pytest.mark.few(12)
@pytest.mark.parametrize("remat", ["none", "full", "min-cut"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", NETS)
def test_steps_are_right_and_ordered(
    name: str, devices: str, place: str, remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated(monkeypatch, 6) as machine:
        check(machine, steps(machine, name, DEVICES[devices], place, remat=remat))
