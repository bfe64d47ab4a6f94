"""Describe a cut by names so that a plan can store it; find it again in a captured graph."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from autopipe.errors import PlanError
from autopipe.passes.graph import fingerprint

from .duplicate_ops import duplicable_ops

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from autopipe.passes.ir import Split

    from .op_groups import OpGroups
    from .stage_estimate import Assignment


class PlannedCut(NamedTuple):
    """A cut that was chosen earlier, described by names of ops.

    Attributes:
        graph: fingerprint of the graph that it was chosen for, with its ops in stage order.
        starts: the first op of each stage but the first.
        runs: if stages are not contiguous in the captured order: in that order, each op that is in
            another stage than the op before it, and its stage. Empty: `starts` is enough.
        duplicated: the ops that several stages compute, and which stages do, ascending.
    """

    graph: str
    starts: tuple[str, ...]
    runs: tuple[tuple[str, int], ...] = ()
    duplicated: tuple[tuple[str, tuple[int, ...]], ...] = ()


def planned_cut_of(split: Split) -> PlannedCut:
    """Describe a cut so that `replay_plan` can repeat it.

    Args:
        split: the cut.
    """
    graph = fingerprint(split.captured.graph_module.graph)
    starts = tuple(name for name in split.firsts[1:] if name is not None)
    return PlannedCut(graph, starts, _runs(split), tuple(split.duplicated.items()))


def _runs(split: Split) -> tuple[tuple[str, int], ...]:
    """`PlannedCut.runs`; empty if `starts` is enough."""
    captured = split.captured
    if not captured.original_positions:
        return ()
    nodes = list(captured.graph_module.graph.nodes)
    stage_of: dict[fx.Node, int] = {}
    for k, ops in enumerate(split.ops):
        for node in ops:
            stage_of.setdefault(node, k)
    placed = sorted(
        (captured.original_position(at), node) for at, node in enumerate(nodes) if node in stage_of
    )
    order = [node for _, node in placed]
    return tuple(
        (node.name, stage_of[node])
        for before, node in zip([None, *order], order, strict=False)
        if before is None or stage_of[before] != stage_of[node]
    )


def replay_plan(planned: PlannedCut, groups: OpGroups, *, must_fit: bool) -> Assignment | None:
    """Assign ops to stages as planned.

    Args:
        planned: the cut.
        groups: the ops of the graph that is cut now.
        must_fit: raise if the cut does not fit this graph.

    Returns:
        The stages of each op; None if the cut does not fit this graph and `must_fit` is False.

    Raises:
        PlanError: the cut does not fit this graph and `must_fit` is True.
    """
    costs = groups.costs
    ops, K = costs.ops, costs.objective.stages
    if not ops:
        return None
    begins = planned.runs or ((ops[0].name, 0), *zip(planned.starts, range(1, K), strict=False))
    position = {ops[start].name: start for start in groups.starts}
    positions = [position.get(name, -1) for name, _ in begins]
    wrong = [name for (name, _), at in zip(begins, positions, strict=True) if at < 0]
    rising = positions[0] == 0 and all(a < b for a, b in pairwise(positions))
    if not wrong and rising and {k for _, k in begins} == set(range(K)):
        ends = [*positions[1:], len(ops)]
        parts = zip(begins, positions, ends, strict=True)
        stage_of = {node: k for (_, k), a, b in parts for node in ops[a:b]}
        wrong = _backward(groups, stage_of) if planned.runs else []
        more = dict(planned.duplicated)
        wrong += _wrong_duplicates(groups, stage_of, more) if more else []
        if not wrong:
            return {node: more.get(node.name, (k,)) for node, k in stage_of.items()}
    if not must_fit:
        return None
    raise PlanError(
        "the plan is not one for this model",
        node=wrong[0] if wrong else None,
        expected="calls of the captured graph, in its order, at which a stage may start",
        found=", ".join(name for name, _ in begins[0 if planned.runs else 1 :]) or "none",
        remedy="make a plan of this model, in the same mode and with the same options",
    )


def _backward(groups: OpGroups, stage_of: Mapping[fx.Node, int]) -> list[str]:
    """The groups that depend on a group in a later stage, by the names of their first ops."""
    ops = groups.costs.ops
    stages = [stage_of[ops[start]] for start in groups.starts]
    before = groups.dag([0] * len(stages)).before
    late = [v for v, k in enumerate(stages) if any(stages[u] > k for u in before[v])]
    return [ops[groups.starts[v]].name for v in late]


def _wrong_duplicates(
    groups: OpGroups, stage_of: Mapping[fx.Node, int], more: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The ops that cannot be computed in the stages that `more` names, by name."""
    K = groups.costs.objective.stages
    duplicable = {node.name: node for node in duplicable_ops(groups)}
    return [
        name
        for name, stages in more.items()
        if name not in duplicable
        or list(stages) != sorted({*stages, stage_of[duplicable[name]]})
        or stages[0] != stage_of[duplicable[name]]
        or stages[-1] >= K
    ]
