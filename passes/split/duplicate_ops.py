"""Duplicate cheap ops: compute a value in each stage that needs it if sending it costs more.

Position tables, masks, casts of ids: values that depend on inputs, constants and buffers alone,
whose ops get no gradient and are not random. For each such value that a stage receives, the cost of
the transfer is compared with that of computing it there, from values that the stage has or would
receive instead. So a mask may be sent before it is expanded, and expanded in the stage that uses
it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor, fx

from autopipe.passes._torch import storage_id_of
from autopipe.passes.graph import has_side_effect, is_random, is_size, written_arguments
from autopipe.passes.ir import InputKind
from autopipe.passes.partition import Edge, min_cut_source_side

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.ir import Input

    from .op_costs import OpCosts
    from .op_groups import OpGroups
    from .stage_estimate import Assignment


def duplicable_ops(groups: OpGroups) -> set[fx.Node]:
    """The ops that any stage may compute for itself; each is a separate group.

    Args:
        groups: the ops.
    """
    costs = groups.costs
    captured = costs.annotated.captured
    alone = {part[0] for part in groups.members if len(part) == 1}
    changed = {target for target, _ in captured.updates}
    written = {storage_id_of(n) for node in costs.ops for n in written_arguments(node)}
    returned = {output.name for output in captured.outputs}
    found: set[fx.Node] = set()
    for node in costs.ops:
        sources = [source for source in node.all_input_nodes if not is_size(source)]
        if (
            node in alone
            and not any(map(is_size, node.users))
            and isinstance(node.meta.get("val"), Tensor)
            and node.name not in returned
            and getattr(node.target, "namespace", None) == "aten"
            and not (is_random(node) or has_side_effect(node) or costs.gets_gradient(node))
            and not {storage_id_of(n) for n in (node, *sources)} & written
            and all(
                source in found or _is_fixed(costs.inputs.get(source.name), changed)
                for source in sources
            )
        ):
            found.add(node)
    return found


def _is_fixed(item: Input | None, changed: set[str]) -> bool:
    """Whether a placeholder has no gradient and is the same in all stages."""
    if item is None or item.kind is InputKind.PARAMETER:
        return False
    if item.kind is InputKind.INPUT:
        return not (item.spec.dtype.is_floating_point or item.spec.dtype.is_complex)
    return item.target not in changed


def duplicate_ops(groups: OpGroups, stage_of: Mapping[fx.Node, int]) -> Assignment:
    """Choose the ops that several stages compute.

    Args:
        groups: the ops.
        stage_of: the stage of each op.

    Returns:
        The stages of each op.
    """
    costs = groups.costs
    assignment: Assignment = {node: (stage_of[node],) for node in costs.ops}
    if costs.objective.transfers_are_free:
        return assignment
    duplicable = duplicable_ops(groups)
    for k in range(costs.objective.stages):
        own = [node for node in costs.ops if k in assignment[node]]
        for node in _cheapest(costs, k, own, duplicable):
            assignment[node] = tuple(sorted((*assignment[node], k)))
    return _without_unused(groups, assignment, duplicable)


def _cheapest(
    costs: OpCosts, k: int, own: Sequence[fx.Node], duplicable: set[fx.Node]
) -> list[fx.Node]:
    """The ops that a stage should compute itself instead of receiving their values.

    The choice is exact, by a min-cut. Each value is available in the stage or not; if it is
    available, it is computed there or received. If the source's side of the cut has (value,
    "available") or (value, "computed"), that is true of the value.
    """
    device = costs.objective.devices[k]
    seconds = costs.seconds(device, costs.objective.policies(k)[0])
    used = {source: None for node in own for source in node.all_input_nodes}
    here = {*own, *(source for source in used if source not in duplicable)}
    todo = [source for source in used if source not in here]
    edges: dict[Edge, float] = {("source", (node, "available")): math.inf for node in todo}
    seen = set(todo)
    while todo:
        node = todo.pop()
        item = costs.inputs.get(node.name)
        free = item is not None and item.kind is not InputKind.INPUT  # a copy of a constant
        transfer = 0.0 if free else device.link.seconds(costs.nbytes(node))
        if node not in duplicable:
            edges[(node, "available"), "sink"] = transfer
            continue
        edges[(node, "available"), (node, "computed")] = transfer
        edges[(node, "computed"), "sink"] = seconds[node]
        for source in node.all_input_nodes:
            if not is_size(source) and source not in here:
                edges[(node, "computed"), (source, "available")] = math.inf
                todo += [source] if source not in seen else []
                seen.add(source)
    side = min_cut_source_side(edges, "source", "sink")
    return [node for node in costs.ops if (node, "computed") in side]


def _without_unused(
    groups: OpGroups, assignment: Assignment, duplicable: set[fx.Node]
) -> Assignment:
    """Remove ops from stages that no longer need their values, because all users compute them.

    (A stage keeps its last remaining op that no earlier stage computes.)
    """
    own = Counter(stages[0] for stages in assignment.values())
    found = dict(assignment)
    for node in reversed(groups.costs.ops):
        stages = found[node]
        if node not in duplicable or len(stages) == 1:
            continue
        needed = {k for user in node.users for k in found[user]}
        if needed - set(stages):  # some stage receives it
            needed.add(stages[0])
        for k in stages:
            first = found[node][0]
            if k not in needed and len(found[node]) > 1 and (k != first or own[k] > 1):
                found[node] = tuple(other for other in found[node] if other != k)
                own[first] -= 1
                own[found[node][0]] += 1
    return found
