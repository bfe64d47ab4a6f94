"""Estimate what ops and stages cost: FLOPs, bytes and seconds. Nothing runs on real data.

In: a `Captured` graph (costs per op, to decide where to cut it) or a traced `StagePhases` (time and
memory of its phases), and `Device` models.
Out: `Annotated` (a `NodeCost` per op, in the batch size `B`), `CallSeconds`, `StageCost`,
`PhaseSeconds`, `StageBytes`.

Read the files in this order:

    `node_costs`      Captured -> Annotated: the cost of every op; seconds of an op on a device
    `grad_flow`       which values need a gradient and which get one
    `call_cache`      equal ops are costed once
    `meta_run`        runs one op and its backward on tensors without memory
    `op_counter`      counts FLOPs and bytes of dispatched kernels; fits polynomials in `B`
    `stage_cost`      the sum over a stage's ops, and the bytes of its parameters
    `at_lengths`      the same at other lengths, and as expressions in lengths
    `phase_time`      seconds of F, R, B and W of a traced stage
    `message_memory`  what arrives in one piece of memory
    `phase_memory`    bytes that one micro-batch occupies at a traced stage
    `offloaded`       which saved values may be offloaded to the host, and their bytes
    `peak_memory`     peak bytes of each stage during one training step
"""

from __future__ import annotations

from .at_lengths import costed_at, stage_costs
from .message_memory import shared_messages
from .meta_run import BoundCall, operand_values, tensor_leaves, tensor_operands, work_key
from .node_costs import CallSeconds, annotate, call_seconds, recomputed_calls
from .offloaded import least_offloaded, leaving_values, offloaded_bytes
from .peak_memory import PeakBytes, peak_bytes, peak_saved_bytes
from .phase_memory import StageBytes, stage_bytes
from .phase_time import (
    PhaseSeconds,
    mean_op_seconds,
    operator_calls,
    phase_seconds,
    recomputes,
    replayed_calls,
)
from .stage_cost import StageCost, cost_of_stage

__all__ = [
    "BoundCall",
    "CallSeconds",
    "PeakBytes",
    "PhaseSeconds",
    "StageBytes",
    "StageCost",
    "annotate",
    "call_seconds",
    "cost_of_stage",
    "costed_at",
    "least_offloaded",
    "leaving_values",
    "mean_op_seconds",
    "offloaded_bytes",
    "operand_values",
    "operator_calls",
    "peak_bytes",
    "peak_saved_bytes",
    "phase_seconds",
    "recomputed_calls",
    "recomputes",
    "replayed_calls",
    "shared_messages",
    "stage_bytes",
    "stage_costs",
    "tensor_leaves",
    "tensor_operands",
    "work_key",
]
