"""TODO."""

from __future__ import annotations

from .meta_run import BoundCall, described, operands_of, stand_ins, tensors_in
from .node_costs import Seconds, annotate, run_again, seconds
from .peak_memory import stage_peaks
from .phase_memory import StageBytes, stage_bytes
from .phase_time import PhaseSeconds, phase_seconds
from .stage_cost import StageCost, stage_cost

__all__ = [
    "BoundCall",
    "PhaseSeconds",
    "Seconds",
    "StageBytes",
    "StageCost",
    "annotate",
    "described",
    "operands_of",
    "phase_seconds",
    "run_again",
    "seconds",
    "stage_bytes",
    "stage_cost",
    "stage_peaks",
    "stand_ins",
    "tensors_in",
]
