"""Move ops near the inputs to the cheapest stage that is not after their first user's.

One example is the lookup in a table that two stages share. If the stage that owns the table
computes it, the activations are sent. If the stage that uses them computes it, the table's gradient
is sent, and a copy of the table needs memory. Another example is a position embedding, computed
early in the captured order and used late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.passes.graph import is_size

from .stage_estimate import estimate_assignment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import fx

    from autopipe.passes.partition import Dag

    from .op_groups import OpGroups
    from .stage_estimate import Assignment

MAX_ANCESTORS = 12
"""A group is moved only if it and the groups that it depends on are at most this many."""

MOVE_STEPS = 1 << 19
"""Budget per graph for evaluating moves, in ops; each takes a few microseconds."""


def relocate_ops(groups: OpGroups, stage_of: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Find better stages for the ops near the inputs.

    Args:
        groups: the ops.
        stage_of: the stage of each op.

    Returns:
        Stages that reduce the sum of the stages' times and do not increase the largest. Where the
        user lists the modules with which stages start, these are `stage_of`.
    """
    costs, members = groups.costs, groups.members
    objective = costs.objective
    stages = [stage_of[part[0]] for part in members]
    if objective.transfers_are_free or objective.cut_at.starts is not None:
        return dict(stage_of)

    def assignment() -> Assignment:
        pairs = zip(members, stages, strict=True)
        return {node: (k,) for part, k in pairs for node in part}

    dag = groups.dag([0] * len(stages))
    best, steps = estimate_assignment(costs, assignment()), MOVE_STEPS
    for group in _movable(groups, dag, stages):
        for to in _possible_stages(dag, group, stages, objective.stages):
            before = [stages[v] for v in group]
            if (steps := steps - len(costs.ops)) < 0:
                break
            for v in group:
                stages[v] = to
            found = estimate_assignment(costs, assignment())
            worse = found.bottleneck > best.bottleneck or not found.fits(objective.limits)
            gain = sum(best.seconds) - sum(found.seconds)
            if worse or gain <= 1e-6 * sum(best.seconds) or len(set(stages)) < objective.stages:
                for v, k in zip(group, before, strict=True):
                    stages[v] = k
            else:
                best = found
    return {node: k for node, (k,) in assignment().items()}


def _movable(groups: OpGroups, dag: Dag, stages: list[int]) -> Iterator[list[int]]:
    """Sets of groups near the inputs that are worth moving together.

    Each set is a group and those of its ancestors that only the set uses. It is worth moving if
    another stage uses the group's results, or an input or parameter that the set uses.
    """
    shared = _shared(groups, stages)
    near: dict[int, set[int]] = {}
    for v, before in enumerate(dag.before):
        if any(u not in near for u in before):
            continue
        ancestors = {v}.union(*(near[u] for u in before))
        if len(ancestors) > MAX_ANCESTORS:
            continue
        near[v] = ancestors
        group = {v}
        for u in sorted(ancestors - {v}, reverse=True):
            if group.issuperset(dag.after[u]):
                group.add(u)
        if shared & group or any(stages[u] != stages[v] for u in dag.after[v]):
            yield sorted(group)


def _shared(groups: OpGroups, stages: list[int]) -> set[int]:
    """The groups that use an input or a parameter which several stages use."""
    users: dict[fx.Node, set[int]] = {}
    for v, part in enumerate(groups.members):
        for node in part:
            for source in node.all_input_nodes:
                if source.op == "placeholder" and not is_size(source):
                    users.setdefault(source, set()).add(v)
    shared = [found for found in users.values() if len({stages[v] for v in found}) > 1]
    return set().union(*shared)


def _possible_stages(dag: Dag, group: list[int], stages: list[int], K: int) -> list[int]:
    """The other stages that a set of groups may be in."""
    within = set(group)
    before = [stages[u] for v in group for u in dag.before[v] if u not in within]
    after = [stages[u] for v in group for u in dag.after[v] if u not in within]
    here = {stages[v] for v in group}
    return [k for k in range(max(before, default=0), min(after, default=K - 1) + 1) if {k} != here]
