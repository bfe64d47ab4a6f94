"""The search over ideals, against brute force over all convex cuts."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import accumulate

import pytest

from autopipe.passes.partition.chain_cut import min_bottleneck
from autopipe.passes.partition.dag import Dag
from autopipe.passes.partition.ideal_search import SearchGraph, search_ideals
from autopipe.passes.partition.lower_bounds import Bounds
from autopipe.passes.partition.order_search import is_refuted
from tests.support.partitions import optimum, some_edges


def side(dag: Dag, K: int = 1, backward: bool = False) -> SearchGraph:
    bounds = Bounds.of(dag, K)
    return (
        SearchGraph.of(dag.reversed(), bounds.heads[::-1])
        if backward
        else SearchGraph.of(dag, bounds.tails)
    )


@pytest.mark.parametrize("backward", [False, True])
def test_a_search_without_a_width_decides(backward: bool) -> None:
    generator = random.Random(2)
    for _ in range(150):
        N = generator.randint(1, 9)
        K, edges = generator.randint(1, N), some_edges(generator, N, 0.25)
        costs = [generator.randint(0, 9) for _ in range(N)]
        best = int(optimum(list(map(Fraction, costs)), edges, K))
        if best == 0:
            continue
        dag = Dag.of(costs, edges)
        found = search_ideals(side(dag, K, backward), K, best, width=None, steps=10**6)
        assert found.order is not None
        order = [N - 1 - v for v in reversed(found.order)] if backward else found.order
        assert sorted(order) == list(range(N))
        assert all(order.index(a) < order.index(b) for a, b in edges)
        prefix = list(accumulate((costs[v] for v in order), initial=0))
        assert min_bottleneck(prefix, K) == best
        if best > max(costs):
            found = search_ideals(side(dag, K, backward), K, best - 1, width=None, steps=10**6)
            assert (found.order, found.complete) == (None, True)
            assert is_refuted(dag, K, best - 1)
        assert not is_refuted(dag, K, best)


def test_a_search_that_leaves_something_out_says_so() -> None:
    costs = [9, 8, 7, 6, 5, 4]  # 13 each in three stages: 9 4 | 8 5 | 7 6
    free = side(Dag.of(costs, []))
    assert search_ideals(free, 3, 13, width=None, steps=10**6).order is not None
    assert search_ideals(free, 3, 12, width=None, steps=10**6).complete
    short = search_ideals(free, 3, 13, width=None, steps=8)
    assert (short.order, short.complete) == (None, False)
    # two stages of 6 hold 2 2 2 | 3 3; of the ideals of one size one alone is not enough
    narrow = side(Dag.of([2, 3, 2, 3, 2], [(0, 1)]))
    assert search_ideals(narrow, 2, 6, width=None, steps=10**6).order is not None
    beams = [search_ideals(narrow, 2, 6, width=width, steps=10**6) for width in range(1, 9)]
    assert all(beam.order is not None or not beam.complete for beam in beams)
    assert beams[0].order is None
    assert beams[-1].order is not None
