"""Graphs reversed, and with twins ordered."""

from __future__ import annotations

import random
from fractions import Fraction

from autopipe.passes.partition.dag import Dag
from tests.support.partitions import optimum, some_edges


def test_twins_are_ordered_and_the_optimum_stays() -> None:
    dag = Dag.of([1, 2, 2, 2, 1], [(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4)])
    assert dag.with_twins_ordered().after == ((1, 2, 3), (2, 4), (3, 4), (4,), ())
    assert Dag.of([1, 2], []).with_twins_ordered() == Dag.of([1, 2], [])
    generator = random.Random(3)
    for _ in range(60):
        N = generator.randint(2, 8)
        edges = some_edges(generator, N, generator.choice([0, 0.1, 0.3]))
        costs, K = [generator.randint(1, 2) for _ in range(N)], generator.randint(1, min(3, N))
        ordered = Dag.of(costs, edges).with_twins_ordered()
        more = [(a, b) for a, after in enumerate(ordered.after) for b in after]
        exact = list(map(Fraction, costs))
        assert optimum(exact, edges, K) == optimum(exact, more, K)


def test_a_graph_reversed_twice_is_itself() -> None:
    dag = Dag.of([1, 2, 3], [(0, 1), (0, 2)])
    assert dag.reversed() == Dag.of([3, 2, 1], [(0, 2), (1, 2)])
    assert dag.reversed().reversed() == dag
    assert not dag.is_chain
    assert Dag.of([1, 2, 3], [(0, 1), (1, 2), (0, 2)]).is_chain
    assert dag.size == 5
