"""The search over orders and its bound, against brute force over all convex cuts."""

from __future__ import annotations

import random
import time
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopipe.passes.partition.api import partition
from autopipe.passes.partition.chain_cut import min_bottleneck
from autopipe.passes.partition.cost_graph import CostGraph
from autopipe.passes.partition.dag import Dag
from autopipe.passes.partition.order_search import (
    WORK,
    alternative_orders,
    is_refuted,
    search_orders,
)
from tests.support.partitions import convex_cuts, optimum, some_edges, stage_costs


def test_the_oracle_is_the_least_of_all_cuts() -> None:
    generator = random.Random(0)
    for _ in range(60):
        N = generator.randint(1, 6)
        K, edges = generator.randint(1, N), some_edges(generator, N, 0.3)
        costs = [Fraction(generator.randint(0, 9)) for _ in range(N)]
        sums = [stage_costs(costs, cut, K) for cut in convex_cuts(N, edges, K)]
        assert optimum(costs, edges, K) == min(map(max, sums))


KINDS = {
    "small integers": lambda g: g.randint(1, 9),
    "with zeros": lambda g: g.randint(0, 2),
    "equal": lambda g: 5,
    "large integers": lambda g: g.randint(0, 2**60),
    "few large": lambda g: g.choice([1, 1, 1, 2, 30]),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_is_the_best_of_all_convex_cuts(kind: str) -> None:
    generator = random.Random(kind)
    for size in range(48):
        N = 1 + size % 12
        edges = some_edges(generator, N, generator.choice([0, 0.05, 0.15, 0.3, 0.6]))
        costs = [KINDS[kind](generator) for _ in range(N)]
        K = generator.randint(1, min(4, N))
        solved = search_orders(Dag.of(costs, edges), K)
        assert (
            solved.bottleneck == solved.lower_bound == optimum(list(map(Fraction, costs)), edges, K)
        )
        prefix = list(accumulate((costs[v] for v in solved.orders[-1]), initial=0))
        assert min_bottleneck(prefix, K) == solved.bottleneck


floats = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.2, 0.3]) | st.floats(0, 1e300)


@pytest.mark.full
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_partitions_of_float_costs_are_optimal(data: st.DataObject) -> None:
    N = data.draw(st.integers(1, 10))
    K = data.draw(st.integers(1, min(4, N)))
    seconds = data.draw(st.tuples(*[floats] * N))
    pairs = [(a, b) for a in range(N) for b in range(a + 1, N)]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    nbytes = data.draw(st.none() | st.tuples(*[st.integers(0, 9)] * N))
    graph = CostGraph(tuple(map(str, range(N))), seconds, tuple(edges), nbytes)
    result = partition(graph, K)
    result.verify(graph)
    assert result.bottleneck == float(optimum(list(map(Fraction, seconds)), edges, K))
    assert result.lower_bound == result.bottleneck
    assert result.gap == 0


def test_as_many_stages_as_nodes() -> None:
    generator = random.Random(1)
    for N in range(1, 9):
        for K in range(max(1, N - 2), N + 1):
            edges = some_edges(generator, N, 0.2)
            costs = [generator.randint(0, 9) for _ in range(N)]
            solved = search_orders(Dag.of(costs, edges), K)
            assert (
                solved.bottleneck
                == solved.lower_bound
                == optimum(list(map(Fraction, costs)), edges, K)
            )


def test_a_chain_is_solved_without_a_search() -> None:
    costs = [random.Random(0).randint(1, 9) for _ in range(3000)]
    solved = search_orders(Dag.of(costs, [(v, v + 1) for v in range(2999)]), 7)
    assert solved.lower_bound == solved.bottleneck
    assert solved.steps == 0


def test_without_sets_the_bound_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopipe.passes.partition.order_search.SET_NODES", 3)
    generator = random.Random(8)
    for _ in range(100):
        N = generator.randint(4, 8)
        K, edges = generator.randint(1, 4), some_edges(generator, N, 0.2)
        costs = [generator.randint(1, 9) for _ in range(N)]
        solved = search_orders(Dag.of(costs, edges), K)
        assert solved.steps == 0
        assert (
            solved.lower_bound <= optimum(list(map(Fraction, costs)), edges, K) <= solved.bottleneck
        )
        for order in alternative_orders(Dag.of(costs, edges), K, solved.bottleneck):
            assert all(order.index(a) < order.index(b) for a, b in edges)
        assert is_refuted(Dag.of(costs, edges), K, solved.lower_bound - 1)
        assert not is_refuted(Dag.of(costs, edges), K, solved.bottleneck)


def test_work_is_bounded_and_results_are_the_same_again() -> None:
    generator = random.Random(0)
    costs = [generator.randint(1, 10**6) for _ in range(60)]
    edges = some_edges(generator, 60, 0.02)
    first, second = (search_orders(Dag.of(costs, edges), 7) for _ in range(2))
    assert first == second
    assert first.lower_bound < first.bottleneck < 1.01 * first.lower_bound  # found, not proven
    assert WORK <= first.steps < 1.01 * WORK


def test_a_graph_of_thousands_of_nodes_is_quick() -> None:
    generator = random.Random(0)
    N, width = 6_000, 100
    seconds = tuple(generator.lognormvariate(0, 1) for _ in range(N))
    edges = tuple(
        (generator.randrange((v // width - 1) * width, v // width * width), v)
        for v in range(width, N)
        for _ in range(2)
    )
    nbytes = tuple(generator.randint(1, 9) for _ in range(N))
    graph = CostGraph(tuple(map(str, range(N))), seconds, edges, nbytes)
    began = time.perf_counter()
    result = partition(graph, 32)
    assert time.perf_counter() - began < 30  # takes 2 s; quadratic code takes minutes
    result.verify(graph)
    assert result.gap < 0.001
