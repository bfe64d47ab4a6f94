"""Trace each stage's joint forward and backward graph, and assign every op to a phase.

    F  forward
    R  recompute what the backward needs and F did not save
    B  gradients of received values, which earlier stages wait for
    W  gradients of the stage's own parameters

In: `PhaseRequest`: a `Split` (stage graphs), metadata of its inputs by micro-batch size, devices, a
rematerialization policy per stage.
Out: `Phased`: for each stage a pure joint graph and the phase of each op.

Read the files in this order:

    `request`             the arguments as one value; the cache of traced stages
    `cut`                 Split -> Phased: trace every stage, cut its joint graph
    `metadata`            shapes and strides of what is traced: numbers, or expressions in sizes
    `trace_sizes`         the sizes of one trace, and the conditions under which it holds
    `batch_norm`          how many samples batch norm in training needs
    `joint_trace`         one stage graph -> its joint forward and backward graph
    `stage_runner`        run a stage graph op by op, also while it is traced
    `upsample_sizes`      the output size of an upsampling op, for symbolic sizes
    `lower_sizes`         write sizes as expressions
    `lower_random`        clean a joint graph; turn random ops into keyed draws of `ctx`
    `function_constants`  write constants that a custom autograd.Function creates
    `assign_phases`       cut one joint graph into F, R, B and W, by reachability
    `select_saved`        select the values that F saves for the backward, by policy
    `evaluate_sizes`      phases with symbolic sizes -> the same with numbers
    `rematerialize`       rewrite a joint graph so that it recomputes what F did not save
"""

from __future__ import annotations

from .batch_norm import batch_norms, least_samples
from .cut import cut_phases, received_strides
from .evaluate_sizes import concrete
from .metadata import TensorMeta
from .request import PhaseRequest, TraceCache
from .stage_runner import run_stage

__all__ = [
    "PhaseRequest",
    "TensorMeta",
    "TraceCache",
    "batch_norms",
    "concrete",
    "cut_phases",
    "least_samples",
    "received_strides",
    "run_stage",
]
