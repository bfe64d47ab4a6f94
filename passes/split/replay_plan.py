"""A cut that was chosen before → the stage of each call."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from autopipe.errors import PlanError
from autopipe.passes.graph import fingerprint

from .duplicate_calls import repeatable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from autopipe.passes.ir import Split

    from .assign_stages import Items
    from .stage_estimate import Placement


class PlannedCut(NamedTuple):
    """A cut that was chosen before.

    graph: fingerprint of the graph that it was chosen for, its calls in the order of the stages.
    starts: the first call of each stage but the first.
    runs: where stages are not runs of the captured order: the calls at which, in that order,
        another stage than that of the call before begins, and which. Empty: as `starts` say.
    repeated: the calls that several stages make for themselves, and which stages do, ascending.
    """

    graph: str
    starts: tuple[str, ...]
    runs: tuple[tuple[str, int], ...] = ()
    repeated: tuple[tuple[str, tuple[int, ...]], ...] = ()


def planned_cut_of(split: Split) -> PlannedCut:
    """What has a cut made again."""
    graph = fingerprint(split.captured.graph_module.graph)
    starts = tuple(name for name in split.firsts[1:] if name is not None)
    return PlannedCut(graph, starts, _runs(split), tuple(split.repeated.items()))


def _runs(split: Split) -> tuple[tuple[str, int], ...]:
    """See `PlannedCut`; empty where its starts say it all."""
    captured = split.captured
    if not captured.original_positions:
        return ()
    nodes = list(captured.graph_module.graph.nodes)
    stage_of: dict[fx.Node, int] = {}
    for k, calls in enumerate(split.calls):
        for node in calls:
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


def made_by(planned: PlannedCut, items: Items, *, must_fit: bool) -> Placement | None:
    """The stages that make each call of a planned cut.

    None if it is not one of this graph, and need not be.

    Raises:
        PlanError: it is none and must be.
    """
    facts = items.facts
    calls, K = facts.calls, facts.aim.stages
    if not calls:
        return None
    begins = planned.runs or ((calls[0].name, 0), *zip(planned.starts, range(1, K), strict=False))
    position = {calls[start].name: start for start in items.starts}
    places = [position.get(name, -1) for name, _ in begins]
    wrong = [name for (name, _), place in zip(begins, places, strict=True) if place < 0]
    rising = places[0] == 0 and all(a < b for a, b in pairwise(places))
    if not wrong and rising and {k for _, k in begins} == set(range(K)):
        ends = [*places[1:], len(calls)]
        parts = zip(begins, places, ends, strict=True)
        stage_of = {node: k for (_, k), a, b in parts for node in calls[a:b]}
        wrong = _backward(items, stage_of) if planned.runs else []
        more = dict(planned.repeated)
        wrong += _unrepeatable(items, stage_of, more) if more else []
        if not wrong:
            return {node: more.get(node.name, (k,)) for node, k in stage_of.items()}
    if not must_fit:
        return None
    raise PlanError(
        "the plan is not one for this model",
        node=wrong[0] if wrong else None,
        expected="calls of the captured graph, in its order, at which a stage may start",
        found=", ".join(name for name, _ in begins[0 if planned.runs else 1 :]),
        remedy="make a plan of this model, in the same mode and with the same options",
    )


def _backward(items: Items, stage_of: Mapping[fx.Node, int]) -> list[str]:
    """The items that depend on some of a later stage, by the names of their first calls."""
    calls = items.facts.calls
    stages = [stage_of[calls[start]] for start in items.starts]
    before = items.dag([0] * len(stages)).before
    late = [v for v, k in enumerate(stages) if any(stages[u] > k for u in before[v])]
    return [calls[items.starts[v]].name for v in late]


def _unrepeatable(
    items: Items, stage_of: Mapping[fx.Node, int], more: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The calls that cannot be made in these stages, by name."""
    K, able = items.facts.aim.stages, {node.name: node for node in repeatable(items)}
    return [
        name
        for name, stages in more.items()
        if name not in able
        or list(stages) != sorted({*stages, stage_of[able[name]]})
        or stages[0] != stage_of[able[name]]
        or stages[-1] >= K
    ]
