"""Captured → Annotated: what every node costs, as expressions in the batch size `B`.

`B` is the only symbol: of a captured graph the batch is the one dimension that is not fixed (a
sequence of another length is captured anew).

Each call runs without memory, forward and backward (`runs`), with exactly the gradients that it
takes part in (`gradients`); calls that are alike are costed once (`distinct`). FLOPs are those of
torch's own formulas; what it has none for (element-wise work) counts none, as in torch. Bytes moved
forwards are one read of every argument and one write of every result of the call as it was
captured; views move nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import sympy
import torch

from autopipe.passes._torch import storage_id
from autopipe.passes.graph import tensors_of
from autopipe.passes.ir import Annotated, B, Captured, NodeCost

from .call_cache import nbytes
from .grad_flow import GradientAnalysis
from .meta_run import tensor_operands

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import fx

    from autopipe.passes.devices import Device
    from autopipe.passes.ir import GradFlow

ZERO_COST = NodeCost()


def annotate(captured: Captured) -> Annotated:
    """Cost every call of a captured graph.

    Returns:
        `Annotated` with a `NodeCost` per node, whose only symbol is `B`.
    """
    found = GradientAnalysis(captured)
    with torch.random.fork_rng(devices=[]):  # a custom Function may draw numbers
        found.run()
    calls = [n for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    costs = {n.name: _cost(n, found) if n in found.of else ZERO_COST for n in calls}
    flows = {n.name: found.flows[n] for n in calls if n in found.flows}
    result = Annotated(captured, costs, flows)
    result.verify()
    return result


class CallSeconds(NamedTuple):
    """Time of one call at one batch size, on one device."""

    forward: float
    backward: float
    recompute: float


def call_seconds(cost: NodeCost, device: Device, batch: int) -> CallSeconds:
    """Estimated time of a call on a device at one batch size.

    Args:
        cost: of the call.
        device: see `autopipe.passes.devices`.
        batch: samples.

    Returns:
        Seconds of the forward, the backward, and of one more forward (`recompute`).
    """

    def time(flops: sympy.Expr, nbytes: sympy.Expr) -> float:
        work, moved = (float(e.subs(B, batch)) for e in (flops, nbytes))
        return device.seconds(work, moved, cost.kind, cost.precision)

    forward = time(cost.forward_flops, cost.forward_bytes)
    return CallSeconds(forward, time(cost.backward_flops, cost.backward_bytes), forward)


def recomputed_calls(nodes: Sequence[fx.Node], flows: Mapping[str, GradFlow]) -> set[fx.Node]:
    """The calls that a backward runs again if of a stage only what it received was kept.

    Those whose results are read again, by their own backward or by that of another call of the
    stage, and what leads to them: the others have done their work when the forward is over.

    Args:
        nodes: the calls of the stage, in order.
        flows: by name of the call.
    """
    read: set[fx.Node] = set()
    for node in nodes:
        flow = flows.get(node.name)
        if flow is not None:
            operands = tensor_operands(node)
            read.update(operands[i] for i in flow.saved_operands)
            if flow.saves_results:
                read.add(node)
    for node in reversed(nodes):
        if node in read:
            read.update(node.all_input_nodes)
    return read.intersection(nodes)


def _cost(node: fx.Node, found: GradientAnalysis) -> NodeCost:
    """Of one call, with what depends on its neighbours: memory that is kept, sums of gradients."""
    cost = found.of[node].cost(found.flows[node].results_get_grad)
    owned = found.owned(node)
    made = {s: nbytes(t) for t in tensors_of(node) if (s := storage_id(t)) not in owned}
    kept = [size for s, size in made.items() if s in found.kept]
    if kept:
        cost = replace(cost, saved_bytes=sympy.Add(cost.saved_bytes, *kept))
    if (more := found.shares[node] - 1) > 0:
        sums = [3 * more * nbytes(t) for t in tensors_of(node)]
        cost = replace(cost, backward_bytes=sympy.Add(cost.backward_bytes, *sums))
    return cost
