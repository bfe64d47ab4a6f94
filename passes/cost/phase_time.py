"""Estimate the time of each phase of a traced stage, op by op of its joint graph.

`node_costs` predicts what an op of the captured graph will cost, to decide where to cut. Here the
stage has been traced: its joint graph contains every kernel of the forward and the backward, each
in its phase, and recomputed ones twice. So F, R, B and W are summed separately, for any
rematerialization policy.

FLOPs follow torch's own formulas. Bytes are one read of every argument and one write of every
result; views move nothing. Seconds come from a `Device`'s roofline.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.passes.graph import cache_per_graph, memory_owner
from autopipe.passes.ir import PHASES

from .op_counter import counted_flops, distinct_bytes, touches_memory, work_kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from autopipe.passes.devices import Device
    from autopipe.passes.ir import StagePhases


class CallWork(NamedTuple):
    """The work of one op: the arguments of `Device.seconds`."""

    flops: int
    moved_bytes: int
    kind: str
    precision: str


class PhaseSeconds(NamedTuple):
    """Seconds of each phase of one micro-batch at one stage.

    Attributes:
        forward: F.
        recompute: R, recomputing what F did not save.
        backward: B, gradients of what the stage received.
        weight: W, gradients of its parameters.
    """

    forward: float = 0.0
    recompute: float = 0.0
    backward: float = 0.0
    weight: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all phases of a micro-batch."""
        return sum(self)


def phase_seconds(stage: StagePhases, device: Device) -> PhaseSeconds:
    """Estimate the time of a traced stage's phases on a device."""
    sums = dict.fromkeys(PHASES, 0.0)
    for (phase, work), count in _phase_work(stage).items():
        sums[phase] += count * device.seconds(*work)
    return PhaseSeconds(*(sums[phase] for phase in PHASES))


def mean_op_seconds(stages: Iterable[StagePhases], device: Device) -> float:
    """Estimate what an op of traced stages takes on a device, on average; 0 without any op."""
    works = [_phase_work(stage) for stage in stages]
    count = sum(sum(work.values()) for work in works)
    seconds = sum(n * device.seconds(*one) for work in works for (_, one), n in work.items())
    return seconds / count if count else 0.0


@cache_per_graph
def operator_calls(stage: StagePhases) -> int:
    """Count the operators that a micro-batch calls at a traced stage, in all phases, views too.

    Each parameter gradient is added to a sum by one more call.
    """
    named = (n for n in stage.graph.nodes if n.name in stage.phase_of)
    calls = [n for n in named if n.op == "call_method" or hasattr(n.target, "_schema")]
    return len(calls) + len(stage.own_grads)


@cache_per_graph
def replayed_calls(stage: StagePhases) -> int:
    """Count what a micro-batch calls at a traced stage whose phases are CUDA graphs.

    F and R are one call each (where R does not wait for other devices, it is one with the rest),
    and so are B and W together. What they receive is copied in, what
    they send is copied out; the seed and the offset of each draw are written before a replay.
    """
    named = {stage.phase_of[n.name] for n in stage.graph.nodes if n.name in stage.phase_of}
    phases = 1 + recomputes(stage) + (not named.isdisjoint("BW"))
    copied = (stage.receives, stage.tangents, stage.returns, stage.sent_grads)
    return phases + sum(map(len, copied)) + 2 * len(stage.draws)


@cache_per_graph
def recomputes(stage: StagePhases) -> bool:
    """Whether R of a traced stage computes anything; views and sizes cost nothing."""
    again = (n for n in stage.graph.nodes if stage.phase_of.get(n.name) == "R")
    return any(isinstance(n.meta.get("val"), Tensor) and memory_owner(n) is n for n in again)


@cache_per_graph
def _phase_work(stage: StagePhases) -> Counter[tuple[str, CallWork]]:
    """Count how often each phase does the same work."""
    return Counter((stage.phase_of[n.name], work) for n, work in stage_work(stage).items())


def stage_work(stage: StagePhases) -> Mapping[fx.Node, CallWork]:
    """Return the work of every op of a traced stage that belongs to a phase, in order."""
    nodes = [n for n in stage.graph.nodes if n.name in stage.phase_of]
    return {n: work for n in nodes if (work := _work(n)) is not None}


def _work(node: fx.Node) -> CallWork | None:
    """The work of one op; None if it does none (it unpacks results)."""
    target: Any = node.target
    args = node.args
    if node.op == "call_method":  # of `ctx`: an operator and then its arguments
        target = next((a for a in args if callable(a) and not isinstance(a, fx.Node)), None)
        args = args[args.index(target) + 1 :] if target is not None else args[1:]
    elif not hasattr(target, "_schema"):
        return None
    args, kwargs = fx.map_arg((args, node.kwargs), lambda n: n.meta.get("val"))
    result = node.meta.get("val")
    read, written = _tensors((args, kwargs)), _tensors(result)
    flops = counted_flops(target, args, kwargs, result)
    moved = (
        sum(map(distinct_bytes, [*read, *written])) if touches_memory(target, read, written) else 0
    )
    floats = [t for t in [*written, *read] if t.is_floating_point()]
    half = bool(floats) and floats[0].dtype.itemsize == 2
    return CallWork(flops, moved, work_kind(target, flops), "half" if half else "fp32")


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a value; the bytes of sparse ones are unknown."""
    leaves = (x for x in pytree.tree_leaves(value) if isinstance(x, Tensor))
    return [x for x in leaves if x.layout is torch.strided]
