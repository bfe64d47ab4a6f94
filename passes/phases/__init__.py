"""TODO."""

from __future__ import annotations

from .cut import cut_phases, received_strides
from .joint_trace import TensorMeta
from .request import PhaseRequest, TraceCache

__all__ = [
    "PhaseRequest",
    "TensorMeta",
    "TraceCache",
    "cut_phases",
    "received_strides",
]
