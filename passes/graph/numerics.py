"""Equality of tensors up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Tolerance relative to the largest entry; 2e-2 for lower-precision dtypes.

Kernels may round differently for another size."""


def is_inexact(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are rounded: floating point or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same shape and dtype and are equal up to rounding."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not is_inexact(found):
        return torch.equal(found, expected)
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    tolerance = TOLERANCE.get(expected.abs().dtype, 2e-2) * scale
    return torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)
