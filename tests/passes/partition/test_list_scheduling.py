"""List schedules are topological orders that fill stages."""

from __future__ import annotations

import random

from autopipe.passes.partition.dag import Dag
from autopipe.passes.partition.list_scheduling import list_schedules
from autopipe.passes.partition.lower_bounds import Bounds
from tests.support.partitions import (
    some_edges,
)


def test_list_schedules_are_topological_orders_that_fill_stages() -> None:
    generator = random.Random(4)
    for _ in range(50):
        N = generator.randint(1, 20)
        edges, costs = some_edges(generator, N, 0.2), [generator.randint(0, 9) for _ in range(N)]
        dag = Dag.of(costs, edges)
        for order in list_schedules(dag, max(1, *costs), Bounds.of(dag, 1).tails):
            assert sorted(order) == list(range(N))
            assert all(order.index(a) < order.index(b) for a, b in edges)
    orders = list(list_schedules(Dag.of([1, 3, 2, 1], []), 4, (1, 3, 2, 1)))
    assert orders == [(3, 2, 0, 1), (1, 0, 2, 3), (1, 0, 2, 3)]


def test_a_list_schedule_that_looks_too_long_is_given_up() -> None:
    costs = [1000] * 400  # each stage takes one and puts the others aside
    assert len(list(list_schedules(Dag.of(costs, []), 1000, costs))) == 1
