"""The program types that passes exchange, and the values in them.

    Captured   one forward graph of the whole model, its batch dimension symbolic
    Annotated  the same, with the cost of every op
    Split      K stage graphs and the values that cross between them
    Phased     each stage's joint forward and backward graph, cut into F, R, B and W

All are frozen. Sizes are sympy expressions in the batch size `B`. `verify()` raises `VerifyError`
on a program that breaks the rules of its type; `str()` prints it for a person. (`Scheduled` and
`Generated`, which hold no graphs, are in `schedule` and `codegen`.)

In: nothing; passes create these objects.
Out: the types above and their parts (`Input`, `Output`, `Route`, `StageGraph`, `StagePhases` ...).

Read the files in this order:

    `combine`   how the micro-batches' values of an output are combined
    `values`    tensors by shape in `B` and dtype; inputs, outputs, result leaves, size guards
    `captured`  Captured, Annotated, NodeCost, GradFlow
    `split`     Split, StageGraph, Route
    `phased`    Phased, StagePhases
    `phase_groups`  what functions of a stage take and return, where phases run in groups
    `graph_part`    GraphPart: ops of such a function for another compiler
"""

from __future__ import annotations

from .captured import NOTHING_READ, ZERO, Annotated, Captured, GradFlow, NodeCost, PythonReads
from .combine import MEAN, REDUCTIONS, SAME, SUM, Combine, Concatenate
from .graph_part import GraphPart
from .phase_groups import Groups, PhaseFunction, phase_functions
from .phased import PHASES, Phased, RandomDraw, StagePhases
from .split import CALLER, Route, Split, StageEstimates, StageGraph
from .values import (
    SINGLE_SAMPLE,
    B,
    Input,
    InputKind,
    Length,
    NumberGuards,
    Output,
    ResultLeaf,
    SizeGuards,
    Sizes,
    TensorSpec,
    all_hold,
    at_batch,
    holds_at,
    number_symbol,
    results_of,
)

__all__ = [
    "CALLER",
    "MEAN",
    "NOTHING_READ",
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
    "GraphPart",
    "Groups",
    "Input",
    "InputKind",
    "Length",
    "NodeCost",
    "NumberGuards",
    "Output",
    "PhaseFunction",
    "Phased",
    "PythonReads",
    "RandomDraw",
    "ResultLeaf",
    "Route",
    "SizeGuards",
    "Sizes",
    "Split",
    "StageEstimates",
    "StageGraph",
    "StagePhases",
    "TensorSpec",
    "all_hold",
    "at_batch",
    "holds_at",
    "number_symbol",
    "phase_functions",
    "results_of",
]
