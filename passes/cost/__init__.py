"""TODO."""

from __future__ import annotations

from .meta_run import BoundCall, operand_values, tensor_leaves, tensor_operands, work_key
from .node_costs import CallSeconds, annotate, call_seconds, recomputed_calls
from .peak_memory import stage_peak_bytes
from .phase_memory import StageBytes, stage_bytes
from .phase_time import PhaseSeconds, phase_seconds
from .stage_cost import StageCost, stage_cost

__all__ = [
    "BoundCall",
    "CallSeconds",
    "PhaseSeconds",
    "StageBytes",
    "StageCost",
    "annotate",
    "call_seconds",
    "operand_values",
    "phase_seconds",
    "recomputed_calls",
    "stage_bytes",
    "stage_cost",
    "stage_peak_bytes",
    "tensor_leaves",
    "tensor_operands",
    "work_key",
]
