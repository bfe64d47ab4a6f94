"""Annotated → Split: K stage graphs with explicit boundary values (the cut in space).

Which call is in which stage is chosen in `convex` and improved in `sources` and `repeats`, or was
planned; if calls of a stage do not stand together the program is brought into an order in which
they do (`reorder`), and the stages are made by `extract_stages.build`. What this file adds is
what may not be parted:

- a value with several results and the calls that unpack it, and
- the life of a tensor that is changed in place: from the first call that knows its memory to the
  last one that writes to it, all stay in one stage, so that no stage ever sees another stage's
  memory change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from autopipe.errors import PartitionError, UnsupportedError
from autopipe.passes._torch import storage_id_of
from autopipe.passes.graph import fingerprint, source_line, warn_at_user_line, written_arguments
from autopipe.passes.ir import Annotated, Input, InputKind, StageEstimates

from .assign_stages import Items, choose
from .call_costs import CallCosts
from .duplicate_calls import repeated
from .extract_stages import build
from .relocate_calls import moved
from .reorder import reordered
from .replay_plan import PlannedCut, made_by
from .stage_estimate import taken

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.ir import Split

    from .objective import Objective
    from .stage_estimate import Placement


def split(
    annotated: Annotated,
    aim: Objective,
    *,
    planned: PlannedCut | None = None,
    must_fit: bool = False,
) -> Split:
    """Cut a captured graph into stage graphs, the largest as fast as can be.

    Args:
        annotated: the graph and its costs.
        aim: what it is cut for, K stages.
        planned: where to cut; without it, where the largest stage is least, or within `SLACK` of
            it with the fewest bytes crossing, under the aim's limits.
        must_fit: a planned cut must be one of this graph; else one that is not is left alone (in
            evaluation a model makes other calls than in training).

    Returns:
        The stages. Where they are not runs of the captured order, `captured` is the same program
        in another one.

    Raises:
        PartitionError: fewer than K runs of calls can be formed, or no cut keeps the limits.
        PlanError: a planned cut is not one of this graph.
    """
    facts, stages = CallCosts(annotated, aim), aim.stages
    calls = facts.calls
    if not calls and stages == 1:
        return build(annotated, {}, StageEstimates((0.0,), (0,), 0.0, (aim.policies(0)[0],)))
    allowed = _allowed(calls, annotated.captured.inputs)
    items = Items(facts, [p for p in range(len(calls)) if not p or allowed[p]])
    made = None
    if planned is not None:
        made = made_by(planned, items, must_fit=must_fit)
    if made is None and stages > len(items.starts):
        raise PartitionError(
            f"the model cannot be cut into {stages} stages",
            expected=f"at least {stages} runs of calls that nothing holds together",
            found=f"{len(calls)} calls, {max(0, len(items.starts) - 1)} positions to cut at",
            remedy="use fewer devices",
        )
    if made is None:
        chosen, planned = choose(items), None
        made, bound = _improved(items, chosen.stage_of), chosen.lower_bound
    else:
        loads = items.rows().loads()
        bound = float(loads.bound * loads.unit)
    result = _built(facts, made, bound)
    graph = result.captured.graph_module.graph
    if planned is not None and must_fit and fingerprint(graph) != planned.graph:
        warn_at_user_line(
            "the plan was made for a graph that differs from the model's in some calls: it is"
            " cut as planned, but what was predicted may not hold"
        )
    return result


def _improved(items: Items, stage_of: Mapping[fx.Node, int]) -> Placement:
    """A cut with less to send: calls near the inputs moved, cheap values made where they are used.

    (Values that are made again take some memory; if it is not there, they are sent.)
    """
    stage_of = moved(items, stage_of)
    made = repeated(items, stage_of)
    if taken(items.facts, made).fits(items.facts.aim.limits):
        return made
    return {node: (k,) for node, k in stage_of.items()}


def _built(facts: CallCosts, made: Placement, bound: float) -> Split:
    """The stages of a cut, and what they take."""
    annotated = facts.annotated
    homes = [made[node][0] for node in facts.calls]
    if homes != sorted(homes):
        annotated = reordered(annotated, {node: stages[0] for node, stages in made.items()})
        named = {node.name: stages for node, stages in made.items()}
        facts = CallCosts(annotated, facts.aim)
        made = {node: named[node.name] for node in facts.calls}
    found = taken(facts, made)
    bound = min(bound, max(found.seconds))  # (which were rounded apart)
    return build(annotated, made, StageEstimates(found.seconds, found.nbytes, bound, found.remat))


def _allowed(calls: Sequence[fx.Node], inputs: Sequence[Input]) -> list[bool]:
    """For each position 0…N: may a stage start there?"""
    position = {n: i for i, n in enumerate(calls)}
    first: dict[int, int] = {}
    blocked = [0] * (len(calls) + 2)
    names = {i.name for i in inputs if i.kind in (InputKind.PARAMETER, InputKind.INPUT)}
    placeholders = [n for c in calls for n in c.all_input_nodes if n.op == "placeholder"]
    fixed = {storage_id_of(n) for n in placeholders if n.name in names}
    changing = {storage_id_of(n) for c in calls for n in written_arguments(c)}

    def hold(start: int, end: int) -> None:
        """Keep calls start…end together."""
        if end > start:
            blocked[start + 1] += 1
            blocked[end + 1] -= 1

    for i, node in enumerate(calls):
        for storage in map(storage_id_of, [*node.all_input_nodes, node]):
            if storage is not None:
                first.setdefault(storage, i)
        for read in node.all_input_nodes:  # a buffer, maybe after a write through a view
            storage = storage_id_of(read)
            if storage is not None and storage in changing and read.op == "placeholder":
                hold(first[storage], i)
        for written in written_arguments(node):
            if storage_id_of(written) in fixed:
                raise UnsupportedError(
                    "the model changes one of its inputs or parameters in place",
                    node=node.name,
                    source=source_line(node),
                    found=f"{node.target} writes to {written.name}",
                    remedy="work on a copy: x = x.clone()",
                )
            storage = storage_id_of(written)
            if storage is not None:
                hold(first[storage], i)
        if isinstance(node.meta.get("val"), (tuple, list)):
            hold(i, max((position[u] for u in node.users if u in position), default=i))
    allowed, depth = [], 0
    for p in range(len(calls) + 1):
        depth += blocked[p]
        allowed.append(depth == 0)
    return allowed
