"""Captured -> Annotated: compute the cost of every node, as expressions in the batch size `B`.

`B` is the only symbol: lengths are those of the example. (`at_lengths` costs the ops at others.)

Each op runs without memory, forward and backward (`meta_run`), with exactly the gradients that it
has in the graph (`grad_flow`). Equal ops are costed once (`call_cache`). FLOPs follow torch's own
formulas; element-wise work, for which torch has none, counts 0. A forward moves one read of every
argument and one write of every result of the captured op; views move no bytes.
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
    from autopipe.passes.kernels import Capability

ZERO_COST = NodeCost()
"""The cost of nodes that run no operator: sizes, and Python functions."""


def annotate(captured: Captured, kernels: Capability | None = None) -> Annotated:
    """Compute the cost of every op of a captured graph.

    Args:
        captured: the graph; it is not changed.
        kernels: the compute capability of a CUDA device whose kernels are costed; None: kernels
            that do not depend on the device.

    Returns:
        `Annotated`, with a `NodeCost` per op, whose only symbol is `B`.
    """
    gradients = GradientAnalysis(captured, kernels)
    with torch.random.fork_rng(devices=[]):  # a custom Function may draw numbers
        gradients.run()
    calls = [n for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    costs = {n.name: _cost(n, gradients) if n in gradients.call_of else ZERO_COST for n in calls}
    flows = {n.name: gradients.flows[n] for n in calls if n in gradients.flows}
    result = Annotated(captured, costs, flows)
    result.verify()
    return result


class CallSeconds(NamedTuple):
    """Seconds of one op at one batch size on one device.

    Attributes:
        forward: of its forward.
        backward: of its backward.
        recompute: of one more forward, if rematerialization recomputes it.
    """

    forward: float
    backward: float
    recompute: float


def call_seconds(cost: NodeCost, device: Device, batch: int) -> CallSeconds:
    """Estimate the time of an op on a device at one batch size.

    Args:
        cost: of the op.
        device: its roofline gives the times.
        batch: samples.
    """

    def time(flops: sympy.Expr, nbytes: sympy.Expr) -> float:
        work, moved = (float(e.subs(B, batch)) for e in (flops, nbytes))
        return device.seconds(work, moved, cost.kind, cost.precision)

    forward = time(cost.forward_flops, cost.forward_bytes)
    return CallSeconds(forward, time(cost.backward_flops, cost.backward_bytes), forward)


def recomputed_calls(nodes: Sequence[fx.Node], flows: Mapping[str, GradFlow]) -> set[fx.Node]:
    """Find the ops that a backward recomputes if a stage saves only what it received.

    These are the ops whose results some backward in the stage reads, and the ops that those results
    are computed from. No backward needs the results of the others.

    Args:
        nodes: the ops of the stage, in order.
        flows: by the name of the op.
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


def _cost(node: fx.Node, gradients: GradientAnalysis) -> NodeCost:
    """Add what depends on other ops: whether its results are saved, and sums of gradients."""
    cost = gradients.call_of[node].cost(gradients.flows[node].results_get_grad)
    owned = gradients.operand_storages(node)
    created = {s: nbytes(t) for t in tensors_of(node) if (s := storage_id(t)) not in owned}
    saved = [size for s, size in created.items() if s in gradients.saved_storages]
    if saved:
        cost = replace(cost, saved_bytes=sympy.Add(cost.saved_bytes, *saved))
    if (sums_needed := gradients.gradient_count[node] - 1) > 0:
        # A sum of two gradients reads both and writes one.
        sums = [3 * sums_needed * nbytes(t) for t in tensors_of(node)]
        cost = replace(cost, backward_bytes=sympy.Add(cost.backward_bytes, *sums))
    return cost
