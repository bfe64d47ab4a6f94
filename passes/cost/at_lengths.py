"""Costs of a program at other lengths than those of its example, and as expressions in lengths.

Ops are costed at the lengths of the example that was captured (`node_costs`): that is what the cut
is made for. For a plan of a call they are costed again at the call's lengths.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import sympy

from autopipe.passes.graph import example_lengths, full_size, tensors_of

from .node_costs import annotate
from .stage_cost import StageCost, cost_of_stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.ir import Sizes, Split

PROBES = (1, 2, 3)
"""Multiples of the lengths at which ops are counted: a cost is at most quadratic in a length."""

CHECKED = 4
"""A multiple at which the expressions are checked."""


def costed_at(split: Split, lengths: Sizes) -> Split:
    """Return the same stages with costs and shapes at other lengths.

    Args:
        split: the stages; their cut and its estimates stay as they are.
        lengths: the value of each length; others are as in the example.
    """
    captured = split.captured
    wanted = {x.name: lengths.get(x.name, x.example) for x in captured.lengths}
    if all(wanted[x.name] == x.example for x in captured.lengths):
        return split
    moved = replace(
        captured,
        outputs=tuple(replace(o, spec=o.spec.at_lengths(wanted)) for o in captured.outputs),
        lengths=tuple(replace(x, example=wanted[x.name]) for x in captured.lengths),
    )
    routes = {n: replace(r, spec=r.spec.at_lengths(wanted)) for n, r in split.routes.items()}
    with example_lengths(captured.graph_module.graph, wanted):
        return replace(split, annotated=annotate(moved), routes=routes)


def stage_costs(split: Split, batch: int) -> tuple[StageCost, ...]:
    """Return the cost of each stage, as expressions in `B` and in lengths.

    Times are those at the split's own lengths. So are the expressions if they are no polynomials of
    at most the second degree in each length, or if a stage cannot be costed at multiples of them.

    Args:
        split: the stages.
        batch: micro-batch size for the times.
    """
    costs = tuple(cost_of_stage(split, stage, batch) for stage in split.stages)
    lengths = {x.name: x.example for x in split.captured.lengths}
    if not lengths or not _are_polynomials(split, lengths):
        return costs

    def at(multiples: Sequence[int]) -> list[dict[str, sympy.Expr]]:
        pairs = zip(lengths.items(), multiples, strict=True)
        moved = costed_at(split, {name: n * factor for (name, n), factor in pairs})
        return [_expressions(cost_of_stage(moved, stage, batch)) for stage in moved.stages]

    counted = {point: at(point) for point in product(PROBES, repeat=len(lengths))}
    checked = at((CHECKED,) * len(lengths))
    values = {name: n * CHECKED for name, n in lengths.items()}
    found = []
    for k, cost in enumerate(costs):
        fitted = {
            fact: _fit({point: c[k][fact] for point, c in counted.items()}, lengths)
            for fact in checked[k]
        }
        holds = all(sympy.expand(e.subs(values) - checked[k][f]) == 0 for f, e in fitted.items())
        found.append(replace(cost, **fitted) if holds else cost)
    return tuple(found)


def _are_polynomials(split: Split, lengths: Sizes) -> bool:
    """Whether every size in the graph is a polynomial in lengths: half of one, rounded, is not."""
    nodes = split.captured.graph_module.graph.nodes
    sizes = {full_size(n) for node in nodes for t in tensors_of(node) for n in t.shape}
    return all(size.is_polynomial(*lengths) for size in sizes)


def _expressions(cost: StageCost) -> dict[str, sympy.Expr]:
    return {f: v for f, v in vars(cost).items() if isinstance(v, sympy.Expr)}


def _fit(points: Mapping[tuple[int, ...], sympy.Expr], lengths: Sizes) -> sympy.Expr:
    """The polynomial in lengths through points, whose values are expressions in `B`."""
    *others, (name, example) = lengths.items()
    if len(set(points.values())) == 1:
        return next(iter(points.values()))
    last: dict[tuple[int, ...], list[tuple[Any, sympy.Expr]]] = {}
    for point, value in points.items():
        last.setdefault(point[:-1], []).append((example * point[-1], value))
    fitted = {rest: sympy.expand(sympy.interpolate(pairs, name)) for rest, pairs in last.items()}
    return _fit(fitted, dict(others)) if others else fitted[()]
