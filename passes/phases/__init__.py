"""TODO."""

from __future__ import annotations

from .cut import TraceCache, phases, received_strides
from .joint_trace import TensorMeta

__all__ = [
    "TensorMeta",
    "TraceCache",
    "phases",
    "received_strides",
]
