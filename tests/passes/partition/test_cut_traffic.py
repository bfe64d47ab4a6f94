"""Bytes that cross boundaries: counted, and few of them among the best cuts."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from autopipe.passes.partition.api import partition
from autopipe.passes.partition.cost_graph import CostGraph
from autopipe.passes.partition.cut_traffic import crossing_bytes, minimize_crossing
from autopipe.passes.partition.dag import Dag
from autopipe.passes.partition.order_search import (
    alternative_orders,
    search_orders,
)
from tests.support.partitions import convex_cuts, some_edges, stage_costs


def test_crossing_bytes_are_counted_at_each_boundary() -> None:
    dag = Dag.of([1, 1, 1, 1], [(0, 1), (0, 3), (1, 2)])
    # value 0 crosses two boundaries, value 1 crosses one, values 2 and 3 none
    assert crossing_bytes(dag, [5, 7, 100, 100], [0, 0, 1, 2]) == 5 * 2 + 7


def test_few_bytes_cross_among_the_best_cuts() -> None:
    """Against all best cuts: mostly the least, never more than the best of the order given."""
    generator = random.Random(7)
    least_found = 0
    for _ in range(120):
        N = generator.randint(3, 8)
        K, edges = generator.randint(2, 3), some_edges(generator, N, 0.3)
        costs = [generator.randint(1, 4) for _ in range(N)]
        nbytes = [generator.randint(0, 9) for _ in range(N)]
        dag = Dag.of(costs, edges)
        solved = search_orders(dag, K)
        orders = [*solved.orders, *alternative_orders(dag, K, solved.bottleneck)]
        stage_of = minimize_crossing(dag, nbytes, orders, K, solved.bottleneck)
        exact = list(map(Fraction, costs))
        assert max(stage_costs(exact, stage_of, K)) == solved.bottleneck
        weights = {
            cut: crossing_bytes(dag, nbytes, cut)
            for cut in convex_cuts(N, edges, K)
            if max(stage_costs(exact, cut, K)) == solved.bottleneck
        }
        found = weights[tuple(stage_of)]
        least_found += found == min(weights.values())
        runs = [w for cut, w in weights.items() if list(cut) == sorted(cut)]
        assert not runs or found <= min(runs)
    assert least_found >= 110


def test_slack_buys_fewer_bytes() -> None:
    names = tuple("abcdef")
    edges = tuple((v, v + 1) for v in range(5))
    graph = CostGraph(names, (1.0,) * 6, edges, (9, 9, 5, 1, 9, 9))
    assert partition(graph, 2).stage_seconds == (3.0, 3.0)
    result = partition(graph, 2, slack=0.34)
    result.verify(graph)
    assert result.stage_seconds == (4.0, 2.0)
    assert (result.lower_bound, result.gap) == (3.0, pytest.approx(1 / 3))


def test_a_cut_that_is_not_contiguous_in_the_order_moves_fewer_bytes() -> None:
    """Two chains side by side: Kahn's order runs one to its end, and cuts the other."""
    edges = ((0, 1), (1, 2), (3, 4), (4, 5))
    graph = CostGraph(tuple("abcdef"), (1.0, 1.0, 2.0, 1.0, 1.0, 2.0), edges, (1,) * 6)
    result = partition(graph, 2)
    assert result.stage_seconds == (4.0, 4.0)
    stages = [result.stage_of[name] for name in "abcdef"]
    assert stages in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
