"""What a stage costs: the sum over its calls, and the bytes of its parameters.

Parameters take memory four times over: their values, their gradients, the optimizer's state, and a
copy in each further stage that uses them (`lent`), with the gradient that goes back.
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
    """What a stage costs; expressions are in the batch size `B`.

    Attributes:
        flops: floating-point operations of its forward.
        backward_flops: of its backward.
        recompute_flops: of what a backward runs again if only what it received was kept.
        moved_bytes: read and written by its forward.
        backward_bytes: read and written by its backward.
        activation_bytes: new memory that its forward's calls make.
        saved_bytes: of that, what autograd keeps for the backward.
        parameter_bytes: of the parameters that it holds.
        gradient_bytes: of the gradients of those that want one.
        optimizer_bytes: of the state that an optimizer keeps for these.
        lent_bytes: of its copies of parameters that other stages hold.
        seconds: estimate of forward and backward on `device`; but for a device that was measured,
            only ratios mean anything.
        forward_seconds: of that, the forward.
        backward_seconds: the backward.
        recompute_seconds: of one more forward, of what is run again.
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
    lent_bytes: int
    seconds: float
    forward_seconds: float
    backward_seconds: float
    recompute_seconds: float


def stage_cost(
    split: Split,
    stage: StageGraph,
    batch: int,
    device: Device = DEFAULT,
    state_bytes: int = ADAM_BYTES,
) -> StageCost:
    """Sum up a stage.

    Args:
        split: the program it belongs to.
        stage: one of its stages.
        batch: micro-batch size of the times.
        device: of the times.
        state_bytes: what the optimizer keeps per element of a parameter, in bytes.
    """
    calls = split.calls[stage.index]
    costs = [split.annotated.costs[n.name] for n in calls]
    repeated = recomputed_calls(calls, split.annotated.flows)
    again = [split.annotated.costs[n.name] for n in calls if n in repeated]
    held = [i for i in stage.held if i.kind is InputKind.PARAMETER]
    trained = [i.spec for i in held if i.requires_grad]
    times = {cost: call_seconds(cost, device, batch) for cost in set(costs)}
    forward = sum(times[c].forward for c in costs)
    backward = sum(times[c].backward for c in costs)
    return StageCost(
        flops=sum_costs(costs, "forward_flops"),
        backward_flops=sum_costs(costs, "backward_flops"),
        recompute_flops=sum_costs(again, "recompute_flops"),
        moved_bytes=sum_costs(costs, "forward_bytes"),
        backward_bytes=sum_costs(costs, "backward_bytes"),
        activation_bytes=sum_costs(costs, "activation_bytes"),
        saved_bytes=sum_costs(costs, "saved_bytes"),
        parameter_bytes=_bytes(i.spec for i in held),
        gradient_bytes=_bytes(trained),
        optimizer_bytes=sum(int(s.numel) * state_bytes for s in trained),
        lent_bytes=_bytes(split.routes[name].spec for name in stage.lent),
        seconds=forward + backward,
        forward_seconds=forward,
        backward_seconds=backward,
        recompute_seconds=sum(times[c].recompute for c in again),
    )


def sum_costs(costs: Iterable[NodeCost], fact: str) -> sympy.Expr:
    """Sum of one fact of `NodeCost`. Equal expressions are counted: adding expressions is slow."""
    counted: dict[sympy.Expr, int] = {}
    for cost in costs:
        expr = getattr(cost, fact)
        counted[expr] = counted.get(expr, 0) + 1
    return sympy.expand(sympy.Add(ZERO, *(count * e for e, count in counted.items())))


def _bytes(specs: Iterable[TensorSpec]) -> int:
    return sum(int(s.nbytes) for s in specs)
