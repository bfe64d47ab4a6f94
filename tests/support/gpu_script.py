"""`benchmarks.gpu` on simulated devices: a machine answers what it asks of `torch.cuda`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu, gpu_device
from benchmarks.gpu_device import Card, refused
from benchmarks.gpu_setting import Setting
from benchmarks.models import transformer
from tests.support.simulated import Machine, pinned, simulated
from tests.support.simulated.backend import move
from tests.support.simulated.engine import run_backward
from tests.support.simulated.machine import TYPE
from tests.support.simulated.pairs import host


class Output(NamedTuple):
    """Like a language model's of transformers, which reads attributes of simulated tensors."""

    loss: Tensor


class Language(nn.Module):
    """A transformer with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = transformer(2, 64, 8, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        words = self.layers(input_ids).flatten(0, 1)
        return Output(nn.functional.cross_entropy(words.float(), labels.flatten()))


class SimulatedCard(Card):
    """A device of a simulated machine.

    Attributes:
        machine, monkeypatch: of the test.
        naps: how often a stream has slept.
    """

    has_streams = True
    machine: Machine
    monkeypatch: pytest.MonkeyPatch
    naps = 0

    def allocated(self) -> int:
        streams = [s for s in self.machine._streams if s.device == self.device]
        for stream in streams:
            stream.memory.reclaim(self.machine.host_knows)
        return sum(s.memory.now for s in streams)

    def peak(self, run: Callable[[], None]) -> float:
        self.machine.rest()
        run()
        return float(sum(s.memory.peak for s in self.machine._streams))

    def is_idle(self, stream: Any) -> bool:
        """Whether the host has waited for it."""
        return self.machine.host.clock.knows(stream, stream._ticks)

    def sleep(self, milliseconds: float) -> None:
        type(self).naps += 1
        with self.machine.lock:
            self.current_stream().tick(milliseconds / 1000)

    @contextmanager
    def waits_are_errors(self) -> Iterator[None]:
        with mock.patch.object(self.machine, "host_waits", refused):
            yield

    def races(self) -> list[str]:
        found = [*self.machine.races]
        self.machine.races.clear()
        return found

    def backward(self, loss: Tensor, of_forward: Any) -> None:
        run_backward(self.machine, loss, {self.device: of_forward}, self.monkeypatch)

    def pinned(self, tensor: Tensor) -> Tensor:
        return pinned(self.machine, tensor)

    def place(self, model: nn.Module) -> nn.Module:
        for tensor in (*model.parameters(), *model.buffers()):
            move(tensor, self.device)
        return model

    def values(self, tensor: Tensor) -> Tensor:
        self.synchronize()
        return host(tensor).clone()


class SimulatedSetting(Setting):
    """GPT-2 is a transformer that reads no attributes of its inputs."""

    def gpt2(self, layers: int = 24, sequence: int = 1024, tiny: int = 2) -> Any:
        model = self.card.place(Language())

        def inputs(batch: int) -> dict[str, Tensor]:
            ids = torch.randint(0, 32, (batch, 8))
            return {"input_ids": self.card.put(ids), "labels": self.card.put(ids)}

        return model, inputs


@contextmanager
def simulated_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """`gpu.main(["--device", "lazy:0", "--tiny"])` runs on a simulated device."""
    with simulated(monkeypatch, 1) as machine:
        made = {"machine": machine, "monkeypatch": monkeypatch, "naps": 0}
        card = type("SimulatedCardOfTest", (SimulatedCard,), made)
        monkeypatch.setitem(gpu_device.CARDS, TYPE, card)
        monkeypatch.setattr(gpu, "Setting", SimulatedSetting)
        yield machine


def script(device: str, *parts: str) -> int:
    """Run parts of the script in this process, with tiny sizes."""
    return gpu.main(["--device", device, "--tiny", "--together", "--part", *parts])
