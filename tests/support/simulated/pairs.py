"""`Pair`: a pipeline on simulated devices, and the same one on CPU workers, which is the truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import autopipe

from .engine import current, on_streams, run_backward
from .machine import Machine
from .nets import NETS
from .tensors import SimulatedTensor, pinned

BATCH, WIDTH, CHUNKS = 8, 8, 4

LEARNING_RATE = 1e-3

Found = list[tuple[str, Tensor, Tensor]]
"""What it is, ours, the truth."""


def host(tensor: Tensor | None) -> Tensor:
    """The values of a tensor on a simulated device."""
    assert tensor is not None
    return (tensor.values if isinstance(tensor, SimulatedTensor) else tensor).detach()


def placed(machine: Machine, tensor: Tensor, place: str) -> Tensor:
    """A copy of a tensor where the caller has it: "cpu", "pinned", or a device."""
    if place == "pinned":
        return pinned(machine, tensor)
    return tensor.clone() if place == "cpu" else tensor.to(place)


def total(result: Any) -> Tensor:
    """One number of a net's result."""
    values = result if isinstance(result, tuple) else (result,)
    return torch.stack([v.sum() for v in values]).sum()


def replace_values(parameter: Tensor, factor: float) -> None:
    """Give a parameter other memory, with its values times a factor (``parameter.data = ...``)."""
    values = parameter.detach() * factor
    if isinstance(parameter, SimulatedTensor):
        assert isinstance(values, SimulatedTensor)
        parameter.values, parameter.block = values.values, values.block
    else:
        parameter.data = values


@contextmanager
def callers_streams(machine: Machine, streams: str) -> Iterator[None]:
    """The caller works on the default streams, or on side streams."""
    if streams == "default":
        yield
        return
    side = machine.side_streams
    before = current(machine)
    for device, stream in side.items():
        stream.wait_stream(before[device])
    with on_streams(machine, side):
        yield
    for device, stream in before.items():
        stream.wait_stream(side[device])


class Pair:
    """Two pipelines of equal models, with an optimizer each.

    Args:
        machine: the devices.
        net: one of `NETS`.
        devices: of the stages.
        frozen: only the first layer is trained, so later devices get no gradients.
        options: of `autopipe.compile`.
    """

    def __init__(
        self,
        machine: Machine,
        net: str,
        devices: Sequence[str],
        *,
        frozen: bool = False,
        **options: Any,
    ) -> None:
        self.machine, self._steps = machine, 0
        self.pipes, self._optimizers = [], []
        for workers in (["cpu"] * len(devices), devices):
            torch.manual_seed(0)
            model = NETS[net](WIDTH)
            trained, *others = model.named_parameters()
            for _, parameter in others if frozen else ():
                parameter.requires_grad_(False)
            parameters = [trained[1], *(p for _, p in others)]
            self._optimizers.append(torch.optim.SGD(parameters, LEARNING_RATE))
            self.pipes.append(autopipe.compile(model, workers, CHUNKS, **options))

    def call(self, pipe: autopipe.Pipeline, x: Tensor, mask: Tensor) -> Tensor:
        torch.manual_seed(self._steps)  # of dropout
        return total(pipe(x, mask))

    def step(self, monkeypatch: pytest.MonkeyPatch, place: str, streams: str) -> Found:
        """One training step, after which the caller overwrites its tensors.

        Args:
            monkeypatch: of the test.
            place: where the caller's tensors are.
            streams: that the caller works on: "default", "side", or "forward on side".
        """
        machine, found = self.machine, []
        self._steps += 1
        x, mask = torch.randn(BATCH, WIDTH), (torch.rand(BATCH, WIDTH) > 0.3).float()
        expected = self.call(self.pipes[0], x.requires_grad_(), mask)
        assert expected != 0  # with too large steps all units die, and every gradient is right
        expected.backward()
        with callers_streams(machine, "default" if streams == "default" else "side"):
            ours = [placed(machine, t.detach(), place) for t in (x, mask)]
            loss = self.call(self.pipes[1], ours[0].requires_grad_(), ours[1])
            of_forward = current(machine)
            if streams == "side":
                run_backward(machine, loss, of_forward, monkeypatch)
        if streams != "side":
            run_backward(machine, loss, of_forward, monkeypatch)
        of_forward = {d: s for d, s in of_forward.items() if streams != "default"}
        with on_streams(machine, of_forward):  # their memory may be used again
            for device in machine.devices:
                torch.zeros(1, device=device)
        found += [
            ("loss", host(loss), expected.detach()),
            ("gradient of x", host(ours[0].grad), host(x.grad)),
        ]
        truth = dict(self.pipes[0].named_parameters())
        for name, parameter in self.pipes[1].named_parameters():
            if parameter.grad is None:
                continue
            found.append((f"gradient of {name}", host(parameter.grad), host(truth[name].grad)))
        with torch.no_grad():
            for tensor in ours:  # the caller uses them for something else
                tensor.zero_()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        buffers = dict(self.pipes[0].named_buffers())
        for name, buffer in self.pipes[1].named_buffers():
            found.append((f"buffer {name}", host(buffer), buffers[name].clone()))
        return found
