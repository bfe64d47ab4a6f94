"""Steps on simulated devices: right numbers, and no access that nothing orders.

Covers the runtime's streams, events and copies; see `tests.support.simulated`. The truth is the
same pipeline on CPU workers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import autopipe
from autopipe.errors import StageError
from autopipe.runtime.executor import Run
from tests.support.simulated import Machine, SimulatedTensor, pinned, simulated
from tests.support.simulated.engine import current, on_streams, run_backward
from tests.support.simulated.nets import NETS

BATCH, WIDTH, CHUNKS = 8, 8, 4
DEVICES = {
    "one": ["lazy:0"],
    "one twice": ["lazy:0"] * 2,
    "two": ["lazy:0", "lazy:1"],
    "four": [f"lazy:{k}" for k in range(4)],
    "the CPU last": ["lazy:0", "lazy:1", "cpu"],
    "the CPU first": ["cpu", "lazy:1", "lazy:0"],
}
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


@contextmanager
def callers_streams(machine: Machine, streams: str) -> Iterator[None]:
    """The caller works on the default streams, or on side streams."""
    if streams == "default":
        yield
        return
    side = {d: machine.new_stream(d) for d in machine.devices}
    before = current(machine)
    for device, stream in side.items():
        stream.wait_stream(before[device])
    with on_streams(machine, side):
        yield
    for device, stream in before.items():
        stream.wait_stream(side[device])


def steps(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    devices: Sequence[str],
    place: str = "cpu",
    streams: str = "default",
    **options: Any,
) -> list[tuple[str, Tensor, Tensor]]:
    """Two training steps on simulated devices and on CPU workers: what, found, expected.

    Args:
        machine: the devices.
        monkeypatch: of the test.
        name: of the model.
        devices: of the stages.
        place: where the caller's tensors are.
        streams: that the caller works on: "default", "side", or "forward on side".
        options: of `autopipe.compile`.
    """
    pipes, optimizers = [], []
    for workers in (["cpu"] * len(devices), devices):
        torch.manual_seed(0)
        net = NETS[name](WIDTH)
        optimizers.append(torch.optim.SGD(net.parameters(), 0.1))
        pipes.append(autopipe.compile(net, workers, CHUNKS, **options))
    found: list[tuple[str, Tensor, Tensor]] = []
    for step in range(2):
        x, mask = torch.randn(BATCH, WIDTH), (torch.rand(BATCH, WIDTH) > 0.3).float()
        expected = total(run(pipes[0], step, x.requires_grad_(), mask))
        expected.backward()
        with callers_streams(machine, "default" if streams == "default" else "side"):
            ours = [placed(machine, t.detach(), place) for t in (x, mask)]
            loss = total(run(pipes[1], step, ours[0].requires_grad_(), ours[1]))
            of_forward = current(machine)
            if streams == "side":
                run_backward(machine, loss, of_forward, monkeypatch)
        if streams != "side":
            run_backward(machine, loss, of_forward, monkeypatch)
        found.append((f"loss {step}", host(loss), expected.detach()))
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


def run(pipe: autopipe.Pipeline, seed: int, x: Tensor, mask: Tensor) -> Any:
    """Call a pipeline; a seed decides what dropout draws."""
    torch.manual_seed(seed)
    return pipe(x, mask)


def check(machine: Machine, found: list[tuple[str, Tensor, Tensor]]) -> None:
    """Values agree, and everything was ordered, frees included."""
    for what, ours, expected in found:
        torch.testing.assert_close(ours, expected, msg=lambda m, what=what: f"{what}: {m}")
    gc.collect()
    assert machine.races == []
    assert machine.counts["kernels"] > 0


STREAMS = ("default", "side", "forward on side")
REMATS = ("none", "full", "min-cut")
COMBINATIONS = [
    pytest.param(name, devices, place, REMATS[(i + j + k) % 3], STREAMS[(i + k) % 3])
    for i, name in enumerate(NETS)
    for j, devices in enumerate(DEVICES)
    for k, place in enumerate(PLACES)
]


@pytest.mark.few(16)
@pytest.mark.parametrize(("name", "devices", "place", "remat", "streams"), COMBINATIONS)
def test_steps_are_right_and_ordered(
    name: str,
    devices: str,
    place: str,
    remat: str,
    streams: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with simulated(monkeypatch, 6) as machine:
        found = steps(machine, monkeypatch, name, DEVICES[devices], place, streams, remat=remat)
        check(machine, found)


@pytest.mark.few(3)
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved", "zb-v"])
def test_schedules_are_ordered(
    schedule: str, streams: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = ["lazy:0", "lazy:1"]
    with simulated(monkeypatch, 6) as machine:
        found = steps(
            *(machine, monkeypatch, "loss", devices, "lazy:5", streams), schedule=schedule
        )
        check(machine, found)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("devices", ["one twice", "four", "the CPU last", "the CPU first"])
@pytest.mark.few(2)
def test_after_a_failed_step_the_caller_waits_for_what_was_queued(
    devices: str, place: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may overwrite its tensors and parameters at once, and call the pipeline again."""
    receive = Run.receive

    def failing(self: Run, value: str, stage: int, m: int) -> Tensor:
        tensor = receive(self, value, stage, m)
        if stage == 1 and m == 2 and value.startswith("grad") == (direction == "backward"):
            raise RuntimeError("as asked")
        return tensor

    with simulated(monkeypatch, 6) as machine:
        torch.manual_seed(0)
        pipe = autopipe.compile(NETS["skip and mask"](WIDTH), DEVICES[devices], CHUNKS)
        with callers_streams(machine, "side"):
            inputs = [placed(machine, torch.ones(BATCH, WIDTH), place) for _ in range(2)]
            pipe(*inputs).sum().backward()  # the parameters are placed
            for _ in range(2):
                with monkeypatch.context() as patch:
                    patch.setattr(Run, "receive", failing)
                    with pytest.raises(StageError, match="as asked"):
                        pipe(*inputs).sum().backward()
                with torch.no_grad():
                    for tensor in (*inputs, *pipe.parameters()):
                        tensor.mul_(1.0)
            pipe(*inputs).sum().backward()
        gc.collect()
        assert machine.races == []
