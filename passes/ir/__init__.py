"""TODO."""

from __future__ import annotations

from .captured import ZERO, Annotated, Captured, GradFlow, NodeCost
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
    "PHASES",
    "SINGLE_SAMPLE",
    "ZERO",
    "Annotated",
    "B",
    "Captured",
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
