"""Where to cut: a cut of a cost graph into stages, and a proof of how near the best it is.

A pipeline is as slow as its slowest stage, so the cut minimises the largest stage (GPipe, arXiv
1811.06965, section 2.2, minimises the variance by a heuristic instead). Every acyclic K-split of a
graph is a contiguous cut of *some* topological order. For one order the optimum is cheap
(`cuts.py`); which order is the hard part (NP-hard), and `solve.py` searches for it, with a bound
that no order can beat.

All comparisons are between integers. A float is an integer over a power of two, so costs are
scaled to integers without rounding; the optimum found is the optimum, and never "infeasible by one
ulp" when a second criterion (the bytes that cross a cut) is optimised under it. This file knows no
torch: it takes measured profiles as well as captured models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from autopipe.errors import OptionError, PartitionError, VerifyError

from .bounds import simple_bound
from .costgraph import CostGraph
from .crossing import least_crossing
from .cuts import cut, integers
from .dag import Dag
from .solve import alternatives, refutes, solve

__all__ = ["CostGraph", "Partition", "cut", "partition"]


@dataclass(frozen=True)
class Partition:
    """Which stage each node is in, and how good that is.

    Attributes:
        stage_of: node name to stage index.
        stage_seconds: K stage costs.
        bottleneck: seconds of the largest stage.
        lower_bound: seconds that the largest stage of no K-split of the graph is below, whatever
            the order of its nodes. Where it is the bottleneck, the cut is optimal.
    """

    stage_of: Mapping[str, int]
    stage_seconds: tuple[float, ...]
    bottleneck: float
    lower_bound: float

    @property
    def balance(self) -> float:
        """Mean stage / largest stage, 1 at best: the factor on a pipeline's speed-up."""
        mean = math.fsum(self.stage_seconds) / len(self.stage_seconds)
        return min(1.0, mean / self.bottleneck) if self.bottleneck else 1.0

    @property
    def gap(self) -> float:
        """How far the bottleneck is above the bound at most, as a fraction of the bound."""
        return self.bottleneck / self.lower_bound - 1 if self.lower_bound else 0.0

    def __str__(self) -> str:
        count = Counter(self.stage_of.values())
        lines = ["stage  nodes       seconds  of bottleneck"]
        for stage, seconds in enumerate(self.stage_seconds):
            share = seconds / self.bottleneck if self.bottleneck else 1.0
            lines.append(f"{stage:5}  {count[stage]:5}  {seconds:12.6g}  {share:13.3f}")
        bound = f"bottleneck {self.bottleneck:.6g} s, lower bound {self.lower_bound:.6g} s"
        gap = f"gap {self.gap:.2%}" if self.gap else "optimal"
        return "\n".join([*lines, f"{bound} ({gap}), balance {self.balance:.3f}"])

    def verify(self, graph: CostGraph) -> None:
        """Check this partition against the graph it was made from; the bound is proven anew.

        Raises:
            VerifyError: a node in no stage or out of range, an empty stage, an edge that goes
                backward, sums that do not agree, or a bound that is above the bottleneck, below
                what the costs alone give, or not proven by a search as long as `partition`'s.
        """
        K = len(self.stage_seconds)
        costs: list[list[float]] = [[] for _ in range(K)]
        for name in self.stage_of.keys() - set(graph.names):
            raise VerifyError("a node is not in the graph", node=name)
        for name, seconds in zip(graph.names, graph.seconds, strict=True):
            stage = self.stage_of.get(name, -1)
            if not 0 <= stage < K:
                raise VerifyError(f"a node is in none of {K} stages", node=name, found=str(stage))
            costs[stage].append(seconds)
        for producer, consumer in graph.edges:
            a, b = graph.names[producer], graph.names[consumer]
            if self.stage_of[a] > self.stage_of[b]:
                found = f"{a} in stage {self.stage_of[a]}, {b} in stage {self.stage_of[b]}"
                raise VerifyError("an edge goes backward", node=b, found=found)
        for stage, values in enumerate(costs):
            if not values:
                raise VerifyError(f"stage {stage} has no node")
            _agree(f"cost of stage {stage}", math.fsum(values), self.stage_seconds[stage])
        _agree("bottleneck", max(self.stage_seconds), self.bottleneck)
        dag, unit = _dag(graph)
        least = _seconds(simple_bound(dag.costs, K), unit)
        if not least <= self.lower_bound <= self.bottleneck:
            expected = f"between {least!r} s, by the costs alone, and the bottleneck"
            found = f"{self.lower_bound!r} s"
            raise VerifyError("the lower bound is out of range", expected=expected, found=found)
        # The bound is rounded to a float; so what is refuted is what is below it as a float.
        below = Fraction(math.nextafter(self.lower_bound, 0))
        if self.lower_bound > least and not refutes(dag, K, math.floor(below / unit)):
            raise VerifyError("the lower bound is not proven", found=f"{self.lower_bound!r} s")


def partition(costs: CostGraph, stages: int, *, slack: float = 0.0) -> Partition:
    """Cut a cost graph into `stages` stages, the largest as small as the search finds.

    Never worse than the exact contiguous cut of `costs.order()`. Optimal, and known to be, where
    the bound meets the bottleneck: so for chains, and for graphs whose ideals can be enumerated
    within a bounded amount of work (see `solve.py`).

    Where output sizes are known, a cut with few bytes crossing it is taken among those as good (a
    value that passes over a stage counts once for each boundary it crosses).

    Args:
        costs: N nodes.
        stages: K, at most N.
        slack: how much of the bottleneck may be given for fewer bytes, a fraction >= 0.

    Raises:
        OptionError: `stages` < 1, or `slack` is not a finite fraction >= 0.
        PartitionError: the graph is not sound, or has fewer nodes than `stages`.
    """
    order, N = costs.order(), len(costs.names)
    if stages < 1:
        raise OptionError("there is no such pipeline", expected="stages >= 1", found=str(stages))
    if not 0 <= slack < math.inf:
        raise OptionError("`slack`", expected="a finite fraction >= 0", found=str(slack))
    if stages > N:
        raise PartitionError(
            f"{stages} stages asked for, {N} possible",
            expected="at least one node in each stage",
            found=f"{N} nodes",
            remedy=f"ask for at most {N} stages" if N else None,
        )
    dag, unit = _dag(costs)
    solved = solve(dag, stages)
    limit = min(sum(dag.costs), math.floor(solved.high * (1 + Fraction(slack))))
    nbytes = [0] * N if costs.nbytes is None else [costs.nbytes[node] for node in order]
    orders = [*solved.orders, *(alternatives(dag, stages, limit) if any(nbytes) else ())]
    found = least_crossing(dag, nbytes, orders, stages, limit)
    stage_of = {costs.names[node]: stage for node, stage in zip(order, found, strict=True)}
    members: list[list[float]] = [[] for _ in range(stages)]
    for name, seconds in zip(costs.names, costs.seconds, strict=True):
        members[stage_of[name]].append(seconds)
    sums = tuple(math.fsum(values) for values in members)
    return Partition(stage_of, sums, max(sums), _seconds(solved.low, unit))


def _dag(graph: CostGraph) -> tuple[Dag, Fraction]:
    """The graph in its `order()`, and the seconds that one unit of its costs is."""
    order = graph.order()
    place = {node: at for at, node in enumerate(order)}
    costs = integers("seconds", [graph.seconds[node] for node in order])
    unit = next((Fraction(graph.seconds[v]) / c for v, c in zip(order, costs, strict=True) if c), 1)
    dag = Dag.of(costs, [(place[a], place[b]) for a, b in graph.edges])
    return dag, Fraction(unit)


def _seconds(units: int, unit: Fraction) -> float:
    """Correctly rounded, so never above a correctly rounded bottleneck that it is not above."""
    return float(units * unit)


def _agree(what: str, expected: float, found: float) -> None:
    if not math.isclose(expected, found, rel_tol=1e-9):
        raise VerifyError(f"{what} is wrong", expected=f"{expected!r} s", found=f"{found!r} s")
