"""Fake tensors of simulated tensors, for captures of models and calls on simulated devices.

Torch makes no fake of a tensor on a "lazy" device, though a fake tensor can be on one.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter
from torch.utils._python_dispatch import _disable_current_modes

from .machine import TYPE
from .tensors import CPU, SimulatedTensor

_from_real_tensor: Any = FakeTensorConverter.from_real_tensor


def _made(self: Any, mode: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, FakeTensor) and tensor.device.type == TYPE:  # of another mode
        device, tensor.fake_device = tensor.device, CPU
        try:
            fake = _from_real_tensor(self, mode, tensor, *args, **kwargs)
        finally:
            tensor.fake_device = device
        fake.fake_device = device
        return fake
    if not isinstance(tensor, SimulatedTensor):
        return _from_real_tensor(self, mode, tensor, *args, **kwargs)
    known = self._get_memo(tensor)
    if known is not None:
        return known
    with _disable_current_modes():  # or a mode of fakes would make one here, with fixed sizes
        values = tensor.values.detach()
    if isinstance(tensor, nn.Parameter):
        values = nn.Parameter(values, tensor.requires_grad)
    else:
        values.requires_grad_(tensor.requires_grad)
    fake = _from_real_tensor(self, mode, values, *args, **kwargs)
    fake.fake_device = tensor.device
    self.set_tensor_memo(tensor, fake)
    return fake


def allow_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch make fake tensors of simulated ones."""
    monkeypatch.setattr(FakeTensorConverter, "from_real_tensor", _made)
