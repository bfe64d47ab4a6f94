"""Annotated → Split: K stage graphs with explicit boundary values (the cut in space).

The captured order of calls is cut into K contiguous runs by `cuts.cut`, on plain arrays; the stages
are made by `stages.build`. What this file adds is where a cut is allowed. A cut may not fall

- between a value with several results and the calls that unpack it, nor
- inside the life of a tensor that is changed in place: from the first call that knows its memory
  to the last one that writes to it, all stay in one stage, so that no stage ever sees another
  stage's memory change.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, fx

from autopipe.errors import PartitionError, PlanError, UnsupportedError

from ._torch import storage_id_of
from .cuts import cut
from .graphs import (
    fingerprint,
    is_size,
    source_line,
    spec_of,
    written_arguments,
)
from .ir import Annotated, B, Input, Kind, NodeCost, at_batch
from .stages import build
from .users import advise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .staged import Split

SLACK = 0.03
"""How far above the least possible bottleneck a cut may lie if fewer bytes cross it. Costs are not
known better than that, and a cut between layers saves memory and reads better."""


class Planned(NamedTuple):
    """A cut that was chosen before.

    graph: fingerprint of the graph that it was chosen for.
    starts: the first call of each stage but the first.
    """

    graph: str
    starts: tuple[str, ...]


def split(
    annotated: Annotated,
    stages: int,
    batch: int,
    *,
    planned: Planned | None = None,
    must_fit: bool = False,
) -> Split:
    """Cut a captured graph into `stages` stage graphs.

    Args:
        annotated: the graph and its costs.
        stages: K ≥ 1.
        batch: micro-batch size at which stages are balanced.
        planned: where to cut; without it, where stages are balanced best.
        must_fit: a planned cut must be one of this graph; else one that is not is left alone (in
            evaluation a model makes other calls than in training).

    Raises:
        PartitionError: fewer than K runs of calls can be formed.
        PlanError: a planned cut is not one of this graph.
    """
    graph = annotated.captured.graph_module.graph
    calls = [n for n in graph.nodes if n.op == "call_function" and not is_size(n)]
    if not calls and stages == 1:
        return build(annotated, {}, 1)
    starts = None
    if planned is not None:
        allowed = _allowed(calls, annotated.captured.inputs)
        starts = _planned(planned, calls, allowed, must_fit=must_fit)
    if starts is None:
        time = rough([annotated.costs[n.name] for n in calls], batch)
        try:
            starts = positions(annotated, calls, time, stages, batch)
        except PartitionError as error:
            raise PartitionError(
                f"the model cannot be cut into {stages} stages",
                expected=f"at least {stages} runs of calls that nothing holds together",
                found=f"{len(calls)} calls; {error.found or error.problem}",
                remedy="use fewer devices",
            ) from error
    bounds = [0, *starts, len(calls)]
    stage_of = {node: k for k in range(stages) for node in calls[bounds[k] : bounds[k + 1]]}
    return build(annotated, stage_of, stages)


def _planned(
    planned: Planned, calls: Sequence[fx.Node], allowed: Sequence[bool], *, must_fit: bool
) -> tuple[int, ...] | None:
    """The positions of a planned cut; None if it is not one of this graph, and need not be."""
    position = {n.name: i for i, n in enumerate(calls)}
    positions = tuple(position.get(name, -1) for name in planned.starts)
    rising = all(a < b for a, b in pairwise((0, *positions)))
    wrong = [n for n, p in zip(planned.starts, positions, strict=True) if p < 1 or not allowed[p]]
    if rising and not wrong:
        if must_fit and fingerprint(calls[0].graph) != planned.graph:
            advise(
                "the plan was made for a graph that differs from the model's in some calls: it is"
                " cut as planned, but what was predicted may not hold"
            )
        return positions
    if not must_fit:
        return None
    raise PlanError(
        "the plan is not one for this model",
        node=wrong[0] if wrong else None,
        expected="calls of the captured graph, in its order, at which a stage may start",
        found=", ".join(planned.starts),
        remedy="make a plan of this model, in the same mode and with the same options",
    )


def positions(
    annotated: Annotated, calls: Sequence[fx.Node], time: Sequence[float], stages: int, batch: int
) -> tuple[int, ...]:
    """Where stages 1 … K-1 start among the calls, for the times that these take.

    Raises:
        PartitionError: as `cut`.
    """
    return cut(
        time,
        stages,
        allowed=_allowed(calls, annotated.captured.inputs),
        crossing=_crossing(calls, batch),
        slack=SLACK,
    )


def rough(costs: Sequence[NodeCost], batch: int) -> list[float]:
    """Forward and backward of each call as three forwards on a rough device, in seconds.

    (Not yet by a `Device` and the backward's own cost: a cut of a U-Net that this gives is not
    bit-equal, see tests/test_bugs.py.)
    """

    def time(cost: NodeCost) -> float:
        facts = (cost.forward_flops, cost.forward_bytes)
        flops, moved = (float(fact.subs(B, batch)) for fact in facts)
        return 3 * (flops / 50e9 + moved / 10e9)

    known = {cost: time(cost) for cost in set(costs)}
    return [known[cost] for cost in costs]


def _allowed(calls: Sequence[fx.Node], inputs: Sequence[Input]) -> list[bool]:
    """For each position 0…N: may a stage start there?"""
    position = {n: i for i, n in enumerate(calls)}
    first: dict[int, int] = {}
    blocked = [0] * (len(calls) + 2)
    names = {i.name for i in inputs if i.kind in (Kind.PARAMETER, Kind.INPUT)}
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


def _crossing(calls: Sequence[fx.Node], batch: int) -> list[float]:
    """For each position 0…N: bytes of the tensors made before it and used after it."""
    position = {n: i for i, n in enumerate(calls)}
    change = [0.0] * (len(calls) + 2)
    for i, node in enumerate(calls):
        if isinstance(node.meta.get("val"), Tensor):
            last = max((position[u] for u in node.users if u in position), default=i)
            if last > i:
                nbytes = at_batch(spec_of(node).nbytes, batch)
                change[i + 1] += nbytes
                change[last + 1] -= nbytes
    total, crossing = 0.0, []
    for p in range(len(calls) + 1):
        total += change[p]
        crossing.append(total)
    return crossing
