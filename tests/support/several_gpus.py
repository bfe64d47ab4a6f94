"""A machine with four GPUs, emulated: what is decided by where parameters are, nothing is computed.

A parameter that is moved to a GPU says that it is there; its values stay in the host's memory.
`spread` gives the stages of a pipeline that was compiled for CPU workers a GPU
each, and captures again, which places them. (tests/system/test_gpu.py does it on real GPUs.)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe import compiled
from autopipe.runtime.backends import BACKENDS, Backend

CPU = torch.device("cpu")
GPUS = tuple(torch.device("cuda", k) for k in range(4))


class FourGpus(Backend):
    """The GPUs, for autopipe's question which there are."""

    def devices(self) -> tuple[torch.device, ...]:
        return GPUS


class SeveralGpus:
    """The emulated machine.

    Attributes:
        moved: the tensors that a pipeline moved, by id, and where to.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved: dict[int, tuple[Tensor, torch.device]] = {}

        def place_of(parameter: Tensor) -> torch.device:
            return self.moved.get(id(parameter), (parameter, CPU))[1]

        def move(tensor: Tensor, device: torch.device) -> None:
            self.moved[id(tensor)] = tensor, device

        def to_one_gpu(model: nn.Module, *args: Any, **_: Any) -> nn.Module:
            for parameter in model.parameters() if args else ():
                move(parameter, torch.device(args[0]))
            return model

        monkeypatch.setattr(nn.Parameter, "device", property(place_of), raising=False)
        monkeypatch.setattr(compiled, "move", move)
        monkeypatch.setattr(nn.Module, "to", to_one_gpu)
        monkeypatch.setitem(BACKENDS, "cuda", FourGpus("cuda"))
        self._monkeypatch = monkeypatch

    def where(self, tensor: Tensor) -> torch.device:
        """The device to which a tensor was moved."""
        return self.moved.get(id(tensor), (tensor, CPU))[1]

    def spread(self, pipe: autopipe.Pipeline, **batch: Tensor) -> None:
        """Let each stage of a pipeline on CPU workers be on a GPU of its own, and place it."""
        captured, _ = pipe._programs.last
        gpus = GPUS[: len(captured.workers)]
        captured.workers = tuple(SimpleNamespace(device=gpu) for gpu in gpus)
        pipe._keep("_devices", gpus)
        pipe.capture(**batch)
        assert autopipe.explain_captures(pipe).count == 1, "only placed"

    def tell_torch(self) -> None:
        """Let torch count the GPUs, which ends what can be captured."""
        self._monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        self._monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
        self._monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
