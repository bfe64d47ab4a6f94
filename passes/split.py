"""Annotated → Split: K stage graphs with explicit boundary values (the cut in space).

The captured order of calls is cut into K contiguous runs by `contiguous.cut_on`, on plain arrays
(`loads`: what each run takes of each device); the stages are made by `stages.build`. What this file
adds is where a cut is allowed. A cut may not fall

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
from .aim import Facts
from .contiguous import cut_on
from .graphs import (
    fingerprint,
    is_size,
    source_line,
    spec_of,
    written_arguments,
)
from .ir import Annotated, Input, Kind, at_batch
from .loads import Rows
from .stages import build
from .users import advise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .aim import Aim
    from .staged import Split
    from .unequal import Loads

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
    aim: Aim,
    *,
    planned: Planned | None = None,
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

    Raises:
        PartitionError: fewer than K runs of calls can be formed, or no cut keeps the limits.
        PlanError: a planned cut is not one of this graph.
    """
    graph, stages = annotated.captured.graph_module.graph, aim.stages
    calls = [n for n in graph.nodes if n.op == "call_function" and not is_size(n)]
    if not calls and stages == 1:
        return build(annotated, {}, Facts((0.0,), (0,), 0.0))
    allowed = _allowed(calls, annotated.captured.inputs)
    at = [p for p in range(len(calls)) if not p or allowed[p]]
    places = None
    if planned is not None:
        places = _planned(planned, calls, allowed, must_fit=must_fit)
    if stages > len(at):
        raise PartitionError(
            f"the model cannot be cut into {stages} stages",
            expected=f"at least {stages} runs of calls that nothing holds together",
            found=f"{len(calls)} calls, {max(0, len(at) - 1)} positions to cut at",
            remedy="use fewer devices",
        )
    loads = Rows(annotated, calls, at, aim).loads()
    starts = None if places is None else [at.index(p) for p in places]
    if starts is None:
        crossing = _crossing(calls, aim.batch)
        starts = [*cut_on(loads, [crossing[p] for p in [*at, len(calls)]], SLACK)]
    bounds = [0, *(at[start] for start in starts), len(calls)]
    stage_of = {node: k for k in range(stages) for node in calls[bounds[k] : bounds[k + 1]]}
    return build(annotated, stage_of, _facts(loads, starts))


def _facts(loads: Loads, starts: Sequence[int]) -> Facts:
    """What the stages of a cut take."""
    times = tuple(float(time * loads.unit) for time in loads.stage_times(starts))
    return Facts(times, loads.stage_bytes(starts), float(loads.bound * loads.unit))


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


def _crossing(calls: Sequence[fx.Node], batch: int) -> list[int]:
    """For each position 0…N: bytes of the tensors made before it and used after it."""
    position = {n: i for i, n in enumerate(calls)}
    change = [0] * (len(calls) + 2)
    for i, node in enumerate(calls):
        if isinstance(node.meta.get("val"), Tensor):
            last = max((position[u] for u in node.users if u in position), default=i)
            if last > i:
                nbytes = at_batch(spec_of(node).nbytes, batch)
                change[i + 1] += nbytes
                change[last + 1] -= nbytes
    total, crossing = 0, []
    for p in range(len(calls) + 1):
        total += change[p]
        crossing.append(total)
    return crossing
