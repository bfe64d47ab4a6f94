"""TODO."""

from __future__ import annotations

from .captured import ZERO, Annotated, Captured, GradFlow, NodeCost
from .combine import MEAN, REDUCTIONS, SAME, SUM, Combine, Concatenate
from .phased import PHASES, Phased, RandomDraw, StagePhases
from .split import CALLER, Route, Split, StageEstimates, StageGraph
from .values import (
    SINGLE_SAMPLE,
    B,
    Input,
    InputKind,
    Output,
    ResultLeaf,
    SizeGuards,
    TensorSpec,
    at_batch,
    holds_at,
    results_of,
)

__all__ = [
    "CALLER",
    "MEAN",
    "PHASES",
    "REDUCTIONS",
    "SAME",
    "SINGLE_SAMPLE",
    "SUM",
    "ZERO",
    "Annotated",
    "B",
    "Captured",
    "Combine",
    "Concatenate",
    "GradFlow",
    "Input",
    "InputKind",
    "NodeCost",
    "Output",
    "Phased",
    "RandomDraw",
    "ResultLeaf",
    "Route",
    "SizeGuards",
    "Split",
    "StageEstimates",
    "StageGraph",
    "StagePhases",
    "TensorSpec",
    "at_batch",
    "holds_at",
    "results_of",
]
