"""Sum up the costs of a stage's ops, and the bytes of its parameters.

A parameter can occupy memory for four things: its value, its gradient, the optimizer's state, and a
copy in each other stage that uses it (`shared`), with the gradient that is sent back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from autopipe.passes.devices import ADAM_BYTES, DEFAULT, Device
from autopipe.passes.ir import ZERO, InputKind

from .node_costs import call_seconds, recomputed_calls

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autopipe.passes.ir import NodeCost, Split, StageGraph, TensorSpec


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage. Expressions are in the batch size `B`.

    Attributes:
        flops: floating-point operations of its forward.
        backward_flops: of its backward.
        recompute_flops: of what the backward recomputes if only received values are saved.
        moved_bytes: bytes read and written by its forward.
        backward_bytes: bytes read and written by its backward.
        activation_bytes: bytes of memory that its forward's ops allocate.
        saved_bytes: the part of these that autograd saves for the backward.
        parameter_bytes: of the parameters that the stage owns.
        gradient_bytes: of the gradients of those that require one.
        optimizer_bytes: of the optimizer state for them.
        shared_copy_bytes: of its copies of shared parameters that other stages own.
        seconds: estimated forward plus backward on a device. If the device was not measured, only
            ratios between stages are meaningful.
        forward_seconds: the forward's part.
        backward_seconds: the backward's part.
        recompute_seconds: of recomputing `recompute_flops`.
    """

    flops: sympy.Expr
    backward_flops: sympy.Expr
    recompute_flops: sympy.Expr
    moved_bytes: sympy.Expr
    backward_bytes: sympy.Expr
    activation_bytes: sympy.Expr
    saved_bytes: sympy.Expr
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    shared_copy_bytes: int
    seconds: float
    forward_seconds: float
    backward_seconds: float
    recompute_seconds: float


def cost_of_stage(
    split: Split,
    stage: StageGraph,
    batch: int,
    device: Device = DEFAULT,
    state_bytes: int = ADAM_BYTES,
) -> StageCost:
    """Sum up the costs of a stage.

    Args:
        split: the program it belongs to.
        stage: one of its stages.
        batch: micro-batch size for the times.
        device: device model for the times.
        state_bytes: bytes of optimizer state per element of a trained parameter.
    """
    ops = split.ops[stage.index]
    costs = [split.annotated.costs[n.name] for n in ops]
    repeated = recomputed_calls(ops, split.annotated.flows)
    recomputed = [split.annotated.costs[n.name] for n in ops if n in repeated]
    parameters = [i for i in stage.held if i.kind is InputKind.PARAMETER]
    trained = [i.spec for i in parameters if i.requires_grad]
    times = {cost: call_seconds(cost, device, batch) for cost in set(costs)}
    forward = sum(times[c].forward for c in costs)
    backward = sum(times[c].backward for c in costs)
    return StageCost(
        flops=sum_costs(costs, "forward_flops"),
        backward_flops=sum_costs(costs, "backward_flops"),
        recompute_flops=sum_costs(recomputed, "recompute_flops"),
        moved_bytes=sum_costs(costs, "forward_bytes"),
        backward_bytes=sum_costs(costs, "backward_bytes"),
        activation_bytes=sum_costs(costs, "activation_bytes"),
        saved_bytes=sum_costs(costs, "saved_bytes"),
        parameter_bytes=_bytes(i.spec for i in parameters),
        gradient_bytes=_bytes(trained),
        optimizer_bytes=sum(int(s.numel) * state_bytes for s in trained),
        shared_copy_bytes=_bytes(split.routes[name].spec for name in stage.shared),
        seconds=forward + backward,
        forward_seconds=forward,
        backward_seconds=backward,
        recompute_seconds=sum(times[c].recompute for c in recomputed),
    )


def sum_costs(costs: Iterable[NodeCost], fact: str) -> sympy.Expr:
    """Sum one field of `NodeCost` over ops.

    Args:
        costs: of the ops.
        fact: name of a field that holds expressions.
    """
    counted: dict[sympy.Expr, int] = {}  # adding expressions is slow, so equal ones are counted
    for cost in costs:
        expr = getattr(cost, fact)
        counted[expr] = counted.get(expr, 0) + 1
    return sympy.expand(sympy.Add(ZERO, *(count * e for e, count in counted.items())))


def _bytes(specs: Iterable[TensorSpec]) -> int:
    return sum(int(s.nbytes) for s in specs)
