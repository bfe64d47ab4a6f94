"""Estimate the time and memory of each stage, for any assignment of ops to stages.

The sums are the same as in `stage_loads` (see `op_costs`). There they are tables for the contiguous
stages of one order, which are quick to compare; here stages may share ops and need not be
contiguous.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import fx

from autopipe.passes.graph import is_size
from autopipe.passes.ir import StageEstimates

from .op_costs import OpCosts, activation_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.passes.ir import Split
    from autopipe.passes.remat_policies import RematPolicy

    from .objective import Objective

Assignment = dict[fx.Node, tuple[int, ...]]
"""For each op the stages that compute it, ascending: one, or several if it is duplicated."""


def estimate_assignment(costs: OpCosts, assignment: Assignment) -> StageEstimates:
    """Estimate the stages of an assignment.

    Args:
        costs: of the ops.
        assignment: the stages of each op.

    Returns:
        Estimates without a lower bound. Each stage has the policy that recomputes least among those
        with which it stays within its limit; if there is none, the policy that needs least memory.
    """
    K = costs.objective.stages
    ops: list[list[fx.Node]] = [[] for _ in range(K)]
    for node in costs.ops:
        for k in assignment[node]:
            ops[k].append(node)
    owned: set[fx.Node] = set()
    seconds, nbytes, remat = [], [], []
    for k, own in enumerate(ops):
        used = {s: None for node in own for s in node.all_input_nodes if not is_size(s)}
        outside = [source for source in used if k not in assignment.get(source, ())]
        first_used = {s: None for s in outside if s not in owned and costs.incoming(s).is_state}
        owned.update(first_used)
        stage = _Stage(k, own, [*first_used], [s for s in outside if s not in first_used])
        policy, size = _policy(costs, stage)
        seconds.append(_seconds(costs, stage, policy))
        nbytes.append(size)
        remat.append(policy)
    return StageEstimates(tuple(seconds), tuple(nbytes), tuple(remat))


def estimate_stages(split: Split, objective: Objective) -> StageEstimates:
    """Estimate the stages of a cut under another objective.

    Args:
        split: the cut.
        objective: devices, policies and limits, one for each stage of the cut.
    """
    assignment: Assignment = {}
    for k, ops in enumerate(split.ops):
        for node in ops:
            assignment[node] = (*assignment.get(node, ()), k)
    return estimate_assignment(OpCosts(split.annotated, objective), assignment)


class _Stage(NamedTuple):
    """Stage k: its ops, the state that it owns (uses first), and the other values that it uses."""

    k: int
    ops: Sequence[fx.Node]
    owned: Sequence[fx.Node]
    incoming: Sequence[fx.Node]


def _policy(costs: OpCosts, stage: _Stage) -> tuple[RematPolicy, int]:
    """The policy that recomputes least within the stage's limit, and the stage's bytes with it.

    (If no policy is within the limit, the one that needs least memory.)
    """
    limit, least = costs.objective.limits[stage.k], None
    for policy in costs.objective.policies(stage.k):
        size = _bytes(costs, stage, policy)
        if limit is None or size <= limit:
            return policy, size
        if least is None or size < least[1]:
            least = (policy, size)
    assert least is not None
    return least


def _seconds(costs: OpCosts, stage: _Stage, policy: RematPolicy) -> float:
    device = costs.objective.devices[stage.k]
    each = costs.seconds(device, policy)
    times = [each[node] for node in stage.ops]
    times += [costs.incoming(node).seconds(device.link) for node in stage.incoming]
    return math.fsum(times)


def _bytes(costs: OpCosts, stage: _Stage, policy: RematPolicy) -> int:
    n, in_flight = costs.objective.in_flight[stage.k], costs.saved_bytes_in_flight(policy)
    saved = sum(costs.saved_bytes[node] for node in stage.ops)
    more = math.fsum(in_flight[node] for node in stage.ops) if n > 1 else 0.0
    size = activation_bytes(saved, more, n)
    size += sum(costs.owned_bytes(node, n) for node in stage.owned)
    size += sum(costs.incoming(node).memory(policy, n) for node in stage.incoming)
    return max(0, size + costs.objective.corrections.get((stage.k, policy), 0))
