"""Operators on lists of tensors, few kernels for all: private names of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def multiply_all_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply tensors in place by a factor; the host waits for it only to multiply its own.

    Args:
        tensors: on any devices.
        factor: a number, or a scalar on some device.
    """
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype, tensor.layout), []).append(tensor)
    for (device, dtype, layout), group in groups.items():
        by = factor
        if isinstance(by, torch.Tensor):
            # With one dimension it keeps its own precision, as a number does.
            is_half = dtype.itemsize == 2 and layout is torch.strided
            dtype = torch.float32 if is_half else dtype
            by = by.to(device, dtype, non_blocking=device.type != "cpu")
            by = by.reshape(1) if is_half else by
        if layout is torch.strided and group[0].dtype == dtype:
            torch._foreach_mul_(group, by)
        else:
            for tensor in group:
                (tensor if tensor.ndim else tensor.view(1)).mul_(by)
