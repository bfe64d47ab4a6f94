"""Lower bounds, against brute force over all convex cuts and all packings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations

import pytest

from autopipe.passes.partition.dag import Dag
from autopipe.passes.partition.lower_bounds import Bounds, bins_needed, simple_bound
from tests.support.partitions import (
    optimum,
    some_edges,
)


@pytest.mark.parametrize(
    ("costs", "K", "bound"),
    [
        ([1, 2, 3, 4], 2, 5),  # half of the sum
        ([1, 2, 3], 2, 3),  # the largest
        ([5, 5, 5], 2, 10),  # two of three come together
        ([7, 6, 5, 4], 3, 9),  # the two least of the four largest
        ([4] * 7, 3, 12),  # three of seven
        ([0, 0], 2, 0),
        ([1], 1, 1),
    ],
)
def test_what_the_costs_alone_give(costs: list[int], K: int, bound: int) -> None:
    assert simple_bound(costs, K) == bound


def test_no_bound_is_above_the_optimum() -> None:
    generator = random.Random(5)
    for _ in range(400):
        N = generator.randint(1, 9)
        K, edges = generator.randint(1, N), some_edges(generator, N, generator.choice([0, 0.2]))
        costs = [generator.choice([generator.randint(0, 9), 2**70]) for _ in range(N)]
        best = int(optimum(list(map(Fraction, costs)), edges, K))
        assert simple_bound(costs, K) <= best
        if best:
            bounds = Bounds.of(Dag.of(costs, edges), K)
            assert not bounds.refutes(best)
            assert bounds.least(max(costs), 2 * best) <= best


def test_heads_and_tails_bound_a_node_from_both_sides() -> None:
    # the middle of a chain of 3 6 3 has 3 before it and 3 behind it
    dag = Dag.of([3, 6, 3, 1], [(0, 1), (1, 2)])
    bounds = Bounds.of(dag, 2)
    assert bounds.heads == (3, 9, 12, 1)
    assert bounds.tails == (12, 9, 3, 1)
    assert bounds.refutes(8)  # 9 are more than one stage from either side
    assert not bounds.refutes(9)
    # a node of 5 that everything of 8 waits for: with 7 it is alone in the first of two stages
    fork = Dag.of([5, 4, 4], [(0, 1), (0, 2)])
    assert Bounds.of(fork, 2).refutes(7)
    assert not Bounds.of(fork, 2).refutes(8)


def test_a_run_of_stages_that_must_hold_too_much_refutes() -> None:
    """Six nodes of 2 between 9 and 9 in three stages of 10: the sum fits, each node has a stage."""
    first, middle, last = range(9), range(9, 15), range(15, 24)
    edges = [(a, b) for a in first for b in middle] + [(a, b) for a in middle for b in last]
    bounds = Bounds.of(Dag.of([1] * 9 + [2] * 6 + [1] * 9, edges), 3)
    assert bounds.heads[9:15] == bounds.tails[9:15] == (11,) * 6  # neither first nor last
    assert max(bins_needed(bounds.costs, 10)) == 3
    assert bounds.refutes(10)
    assert not bounds.refutes(11)  # 9 + 2, four of 2, 2 + 9


def test_heads_and_tails_are_never_too_large_where_costs_are_longer_than_a_float() -> None:
    costs = [2**200 + 1, 2**150 + 1, 3, 2**10]
    bounds = Bounds.of(Dag.of(costs, [(0, 1), (1, 2), (2, 3)]), 2)
    for v, (head, tail) in enumerate(zip(bounds.heads, bounds.tails, strict=True)):
        assert head <= sum(costs[: v + 1])
        assert tail <= sum(costs[v:])
    assert bounds.heads[0] > costs[0] * 0.999


def test_long_graphs_have_the_longest_path_for_a_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    dag = Dag.of([1, 2, 3, 4], [(0, 1), (0, 2), (1, 3), (2, 3)])
    assert Bounds.of(dag, 2).tails == (10, 6, 7, 4)
    monkeypatch.setattr("autopipe.passes.partition.lower_bounds.CLOSURE_NODES", 3)
    assert Bounds.of(dag, 2).tails == (8, 6, 7, 4)


def packed(costs: Sequence[int], limit: int) -> int:
    """The least number of bins, by first fit over every order."""
    best = len(costs)
    for order in set(permutations(costs)):
        bins: list[int] = []
        for cost in order:
            fit = next((b for b, load in enumerate(bins) if load + cost <= limit), None)
            if fit is None:
                bins.append(cost)
            else:
                bins[fit] += cost
        best = min(best, len(bins))
    return best


def test_bin_packing_bounds_hold_and_bite() -> None:
    generator = random.Random(6)
    for _ in range(150):
        limit = generator.randint(6, 20)
        costs = [generator.randint(1, limit) for _ in range(generator.randint(1, 6))]
        costs.sort(reverse=True)
        assert max(bins_needed(costs, limit)) <= packed(costs, limit)
    assert max(bins_needed([6, 6, 6], 10)) == 3  # no two fit together
    assert max(bins_needed([7, 7, 4, 4, 4], 10)) == 4  # nothing of 4 fits beside a 7
    assert max(bins_needed([12, 12, 9], 20)) == 3  # nor a 9: only L2 sees it
    assert max(bins_needed([4, 4, 4, 4, 4], 11)) == 3  # two to a bin; 20 would fit into two
    assert max(bins_needed([3, 3, 3, 3, 3, 3, 3], 11)) == 3  # three to a bin; 21 fit into two
