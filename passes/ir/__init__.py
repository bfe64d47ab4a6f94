"""TODO."""

from __future__ import annotations

from .captured import ZERO, Annotated, Captured, Flow, NodeCost
from .combine import MEAN, REDUCTIONS, SAME, SUM, Combine, Concatenate
from .phased import PHASES, Draw, Phased, StagePhases
from .split import CALLER, Route, Split, StageEstimates, StageGraph
from .values import (
    ONE,
    B,
    Branches,
    Input,
    Kind,
    Leaf,
    Output,
    TensorSpec,
    at_batch,
    is_true,
    results_of,
)

__all__ = [
    "CALLER",
    "MEAN",
    "ONE",
    "PHASES",
    "REDUCTIONS",
    "SAME",
    "SUM",
    "ZERO",
    "Annotated",
    "B",
    "Branches",
    "Captured",
    "Combine",
    "Concatenate",
    "Draw",
    "Flow",
    "Input",
    "Kind",
    "Leaf",
    "NodeCost",
    "Output",
    "Phased",
    "Route",
    "Split",
    "StageEstimates",
    "StageGraph",
    "StagePhases",
    "TensorSpec",
    "at_batch",
    "is_true",
    "results_of",
]
