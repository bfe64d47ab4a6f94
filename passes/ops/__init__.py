"""TODO."""

from __future__ import annotations

from .autograd_function import under
from .ctc_loss import ctc_losses

__all__ = [
    "ctc_losses",
    "under",
]
