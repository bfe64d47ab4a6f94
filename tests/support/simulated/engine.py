"""The backward of a loss as torch's autograd engine runs it for GPUs.

The engine runs tensors of type "lazy" in the calling thread, on its streams. For a GPU it runs a
node in a thread of the device, on the stream on which the node's forward ran; the thread's streams
on other devices are the default ones. It orders gradients by these streams only (torch's
``input_buffer.cpp`` and "Stream semantics of backward passes" in its CUDA notes):

- a gradient on the node's own device was computed on the node's stream;
- one on another device was computed on that device's default stream;
- the stream of a parameter's forward waits for these, and the caller's streams for that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from autopipe.runtime.autograd import PipelineFunction

from .machine import Machine
from .streams import Stream
from .tensors import Simulation

Streams = Mapping[torch.device, Stream]


@contextmanager
def on_streams(machine: Machine, streams: Streams) -> Iterator[None]:
    """The calling thread works on these streams while the context is open."""
    with ExitStack() as stack:
        for device, stream in streams.items():
            before = machine.set_stream(device, stream)
            stack.callback(machine.set_stream, device, before)
        yield


def current(machine: Machine) -> dict[torch.device, Stream]:
    """The calling thread's streams."""
    return {d: machine.current_stream(d) for d in machine.devices}


def run_backward(
    machine: Machine, loss: Tensor, of_forward: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call ``loss.backward()``.

    Args:
        machine: where it runs.
        loss: of one pipeline call.
        of_forward: the streams that the caller worked on then.
        monkeypatch: of the test.
    """
    callers, device = current(machine), loss.device
    original = PipelineFunction.backward

    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        defaults = {d: machine.default_stream(d) for d in machine.devices if d != device}
        for gradient in gradients:
            if gradient is not None and gradient.device in defaults:
                defaults[gradient.device].wait_stream(of_forward[gradient.device])
        with on_streams(machine, defaults):
            found = original(ctx, *gradients)
        reached = {g.device for g in found if g is not None}
        for other, stream in defaults.items():
            if other in reached:
                of_forward[other].wait_stream(stream)
        return found

    def engine() -> None:
        with on_streams(machine, of_forward), monkeypatch.context() as patch:
            patch.setattr(PipelineFunction, "backward", staticmethod(backward))
            loss.backward()

    if device.type == "cpu":
        loss.backward()
        return
    of_forward[device].wait_stream(callers[device])

    def simulating() -> None:
        with Simulation(machine):  # a mode is of one thread
            engine()

    machine.engine.submit(simulating).result()
    for d, stream in callers.items():
        stream.wait_stream(of_forward[d])
