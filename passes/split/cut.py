"""Annotated → Split: K stage graphs with explicit boundary values."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from autopipe.errors import PartitionError, shown
from autopipe.passes.graph import fingerprint, warn_at_user_line
from autopipe.passes.ir import Annotated, StageEstimates

from .assign_stages import assign_stages
from .duplicate_ops import duplicate_ops
from .extract_stages import extract_stages
from .follow_cut import EarlierCut, follow_cut
from .objective import ANYWHERE
from .op_costs import OpCosts
from .op_groups import OpGroups
from .relocate_ops import relocate_ops
from .reorder import reorder_by_stage
from .replay_plan import PlannedCut, replay_plan
from .stage_estimate import estimate_assignment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from autopipe.passes.ir import Split

    from .objective import Objective
    from .stage_estimate import Assignment


def split(
    annotated: Annotated,
    objective: Objective,
    *,
    planned: PlannedCut | None = None,
    must_fit: bool = False,
    earlier: EarlierCut | None = None,
) -> Split:
    """Cut a captured graph into stage graphs so that the slowest stage is as fast as possible.

    Args:
        annotated: the graph and its costs.
        objective: what it is cut for, K stages.
        planned: where to cut. None: find the cut under the objective's limits whose slowest stage
            is fastest or within `SLACK` of that, with the fewest bytes crossing; of these, the one
            within fewest modules. Where devices have several stages and that cut loads them
            unevenly: one that does not, with no slower stage than `SLACK` allows.
        must_fit: raise if the planned cut is not one of this graph; else such a cut is ignored (in
            evaluation mode a model may run other ops than in training).
        earlier: a cut of another capture of the same model, to follow.

    Returns:
        The stages. Where they are not runs of the captured order, `captured` is the same program
        in another order.

    Raises:
        PartitionError: the graph has fewer than K groups of ops that may be in different stages,
            or no cut satisfies the limits.
        PlanError: a planned cut is not one of this graph.
        UnsupportedError: the model changes an input or a parameter in place.
    """
    costs, stages = OpCosts(annotated, objective), objective.stages
    if not costs.ops and stages == 1:
        empty = StageEstimates((0.0,), (0,), (objective.policies(0)[0],))
        return extract_stages(annotated, {}, empty)
    groups = OpGroups.of(costs)
    smallest = OpGroups.smallest(costs)
    if earlier is not None:
        return _extracted(costs, follow_cut(earlier, groups), 0.0, earlier.owners)
    assignment = None
    if planned is not None:
        assignment = replay_plan(planned, smallest, must_fit=must_fit)
    if assignment is None:
        _check_enough(groups)
        chosen, planned = assign_stages(groups), None
        assignment, bound = _improved(groups, chosen.stage_of), chosen.lower_bound
    else:
        loads = smallest.in_order().loads()
        bound = float(loads.lower_bound * loads.unit)
    result = _extracted(costs, assignment, bound)
    graph = result.captured.graph_module.graph
    if planned is not None and must_fit and fingerprint(graph) != planned.graph:
        warn_at_user_line(
            "the plan was made for a graph that differs from the model's in some ops: it is"
            " cut as planned, but what was predicted may not hold"
        )
    return result


def _check_enough(groups: OpGroups) -> None:
    """Check that there are as many groups as stages.

    Raises:
        PartitionError: there are fewer. The error counts positions to cut at, and names the modules
            that the user listed but with which no stage can start.
    """
    costs, found = groups.costs, len(groups.starts)
    stages, cut_at = costs.objective.stages, costs.objective.cut_at
    if stages <= found:
        return
    restricted = cut_at != ANYWHERE
    starts = {costs.ops[at] for at in groups.starts[1:]}
    paths = {path for node in starts for path in node.meta.get("modules", ())}
    useless = sorted((cut_at.starts or frozenset()) - paths)
    raise PartitionError(
        f"the model cannot be cut into {stages} stages" + " where `cut_at` allows it" * restricted,
        expected=f"at least {stages} groups of ops that can be in different stages",
        found=f"{len(costs.ops)} ops, {max(0, found - 1)} positions to cut at"
        + f"; none at {', '.join(map(shown, useless))}" * bool(useless),
        remedy="use fewer devices, or fewer stages on each"
        + ", or allow cuts at more modules" * restricted,
    )


def _improved(groups: OpGroups, stage_of: Mapping[fx.Node, int]) -> Assignment:
    """A cut with fewer transfers: some ops relocated, some duplicated.

    (Duplicates need some memory; if there is not enough, the values are sent instead.)
    """
    stage_of = relocate_ops(groups, stage_of)
    assignment = duplicate_ops(OpGroups.smallest(groups.costs), stage_of)
    if estimate_assignment(groups.costs, assignment).fits(groups.costs.objective.limits):
        return assignment
    return {node: (k,) for node, k in stage_of.items()}


def _extracted(
    costs: OpCosts,
    assignment: Assignment,
    bound: float,
    owners: Mapping[str, int] = MappingProxyType({}),
) -> Split:
    """The stage graphs of an assignment, with their estimates.

    Args:
        costs: of the ops.
        assignment: the stages of each op.
        bound: seconds of the slowest stage that no cut can be below; 0: unknown.
        owners: parameter → the stage that owns it; the others belong to the first that uses them.
    """
    annotated = costs.annotated
    first_stages = [assignment[node][0] for node in costs.ops]
    if first_stages != sorted(first_stages):
        stage_of = {node: stages[0] for node, stages in assignment.items()}
        annotated = reorder_by_stage(annotated, stage_of)
        by_name = {node.name: stages for node, stages in assignment.items()}
        costs = OpCosts(annotated, costs.objective)
        assignment = {node: by_name[node.name] for node in costs.ops}
    estimates = estimate_assignment(costs, assignment)
    bound = min(bound, estimates.bottleneck)  # (they are rounded differently)
    return extract_stages(annotated, assignment, replace(estimates, lower_bound=bound), owners)
