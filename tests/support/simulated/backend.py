"""The simulated devices as autopipe's runtime sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe import call_signature, compiled
from autopipe.runtime.backends import BACKENDS, Backend

from .fakes import allow_fakes
from .graphs import SimulatedGraphPool
from .machine import TYPE, Cost, Machine
from .streams import Stream
from .tensors import SimulatedTensor, Simulation


class SimulatedBackend(Backend):
    """Devices of a simulated machine."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(TYPE)
        self.machine = machine

    def devices(self) -> tuple[torch.device, ...]:
        return self.machine.devices

    def find(self, device: torch.device) -> torch.device | None:
        found = torch.device(TYPE, device.index or 0)
        return found if found in self.machine.devices else None

    def name(self, device: torch.device) -> str:
        return "a simulated device"

    def new_stream(self, device: torch.device) -> Stream:
        return self.machine.new_stream(device)

    def current_stream(self, device: torch.device) -> Stream:
        return self.machine.current_stream(device)

    def default_stream(self, device: torch.device) -> Stream:
        return self.machine.default_stream(device)

    @contextmanager
    def use_stream(self, stream: Any) -> Iterator[None]:
        before = self.machine.set_stream(stream.device, stream)
        try:
            yield
        finally:
            self.machine.set_stream(stream.device, before)

    def record_use(self, tensor: Tensor, stream: Any) -> None:
        tensor.record_stream(stream)

    def new_capture_stream(self, device: torch.device) -> Stream:
        return self.machine.new_stream(device)

    def new_graph_pool(self, device: torch.device, stream: Any) -> SimulatedGraphPool:
        return SimulatedGraphPool(self.machine, device, stream)

    def new_generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator()

    def synchronize(self, device: torch.device) -> None:
        self.machine.synchronize(device)


def move(tensor: Tensor, device: torch.device) -> None:
    """Move a parameter or buffer in place, also between kinds of tensors: it stays the same object.

    (`Tensor.data` takes no tensor of another kind. `torch.utils.swap_tensors` refuses tensors to
    which weak references exist, which is right for its callers: theirs may change size.)
    """
    gradient, tensor.grad = tensor.grad, None
    moved = tensor.detach().to(device)
    if isinstance(tensor, nn.Parameter):
        moved = nn.Parameter(moved, tensor.requires_grad)
    kinds = type(tensor), type(moved)
    tensor.__class__, moved.__class__ = kinds[1], kinds[0]
    tensor.__dict__, moved.__dict__ = moved.__dict__, tensor.__dict__
    torch._C._swap_tensor_impl(tensor, moved)
    tensor.grad = None if gradient is None else gradient.to(device)


@contextmanager
def simulated(
    monkeypatch: pytest.MonkeyPatch,
    count: int = 4,
    cost: Cost = lambda op, device: 0.0,
    judge: Any = None,
) -> Iterator[Machine]:
    """A machine with simulated devices, for as long as the context is open.

    Args:
        monkeypatch: of the test.
        count: of the devices.
        cost, judge: as for `Machine`.
    """
    machine = Machine(count, cost, judge)
    monkeypatch.setattr(compiled, "move", move)
    allow_fakes(monkeypatch)
    kinds = (*call_signature.KINDS_OF_TENSORS, SimulatedTensor)
    monkeypatch.setattr(call_signature, "KINDS_OF_TENSORS", kinds)
    monkeypatch.setitem(BACKENDS, TYPE, SimulatedBackend(machine))
    with Simulation(machine):
        yield machine
    machine.engine.shutdown()
