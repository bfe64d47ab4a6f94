"""A cut that was chosen before → the stage of each call."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from autopipe.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from .convex import Items
    from .staged import Split


class Planned(NamedTuple):
    """A cut that was chosen before.

    graph: fingerprint of the graph that it was chosen for, its calls in the order of the stages.
    starts: the first call of each stage but the first.
    runs: where stages are not runs of the captured order: the calls at which, in that order,
        another stage than that of the call before begins, and which. Empty: as `starts` say.
    """

    graph: str
    starts: tuple[str, ...]
    runs: tuple[tuple[str, int], ...] = ()


def runs_of(split: Split) -> tuple[tuple[str, int], ...]:
    """What a plan must say to have a cut made again; empty where its starts say it all."""
    captured = split.captured
    if not captured.places:
        return ()
    nodes = list(captured.graph_module.graph.nodes)
    stage_of = {node: k for k, calls in enumerate(split.calls) for node in calls}
    placed = sorted((captured.place(at), node) for at, node in enumerate(nodes) if node in stage_of)
    calls = [node for _, node in placed]
    return tuple(
        (node.name, stage_of[node])
        for before, node in zip([None, *calls], calls, strict=False)
        if before is None or stage_of[before] != stage_of[node]
    )


def stages_of(planned: Planned, items: Items, *, must_fit: bool) -> dict[fx.Node, int] | None:
    """The stage of each call of a planned cut.

    None if it is not one of this graph, and need not be.

    Raises:
        PlanError: it is none and must be.
    """
    facts = items.facts
    calls, K = facts.calls, facts.aim.stages
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
        if not wrong:
            return stage_of
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
