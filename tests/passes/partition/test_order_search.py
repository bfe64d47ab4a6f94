"""The search over orders and its bounds, against brute force over all convex cuts."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopipe.passes.partition.api import partition
from autopipe.passes.partition.chain_cut import bottleneck
from autopipe.passes.partition.cost_graph import CostGraph
from autopipe.passes.partition.cut_traffic import crossing_bytes, least_crossing
from autopipe.passes.partition.dag import Dag
from autopipe.passes.partition.ideal_search import Side, search
from autopipe.passes.partition.list_scheduling import schedules
from autopipe.passes.partition.lower_bounds import Bounds, bins_needed, simple_bound
from autopipe.passes.partition.order_search import WORK, alternatives, refutes, solve

Edges = Sequence[tuple[int, int]]

# ------------------------------------------------------------------------------------ the oracle


def convex_cuts(N: int, edges: Edges, K: int) -> Iterator[tuple[int, ...]]:
    """The stage of each node, for every cut in which no edge goes back and no stage is empty.

    Nodes are placed one after the other, after all their producers. (Edges go upward.)
    """
    before = [[a for a, b in edges if b == v] for v in range(N)]
    stage = [0] * N

    def place(v: int) -> Iterator[tuple[int, ...]]:
        if v == N:
            if len(set(stage)) == K:
                yield tuple(stage)
            return
        for k in range(max((stage[p] for p in before[v]), default=0), K):
            stage[v] = k
            yield from place(v + 1)

    return place(0)


def optimum(costs: Sequence[Fraction], edges: Edges, K: int) -> Fraction:
    """The least largest stage over all convex cuts: a programme over pairs of ideals.

    `least[I]` is the optimum of I in k stages, the last of which is I without some ideal J of it.
    """
    N = len(costs)
    before = [sum(1 << a for a, b in edges if b == v) for v in range(N)]
    ideals = [
        s for s in range(1 << N) if all(not s >> v & 1 or not before[v] & ~s for v in range(N))
    ]
    known = set(ideals)
    weight = {s: sum(costs[v] for v in range(N) if s >> v & 1) for s in ideals}
    within: dict[int, list[int]] = {}
    for s in ideals:
        part, within[s] = s, []
        while part:
            part = (part - 1) & s
            if part in known:
                within[s].append(part)
    least: dict[int, Fraction] = {0: Fraction(0)}
    for _ in range(K):
        least = {
            s: min(max(least[part], weight[s] - weight[part]) for part in parts)
            for s in ideals
            if (parts := [part for part in within[s] if part in least])
        }
    return least[(1 << N) - 1]


def test_the_oracle_is_the_least_of_all_cuts() -> None:
    generator = random.Random(0)
    for _ in range(60):
        N = generator.randint(1, 6)
        K, edges = generator.randint(1, N), some_edges(generator, N, 0.3)
        costs = [Fraction(generator.randint(0, 9)) for _ in range(N)]
        sums = [stage_costs(costs, cut, K) for cut in convex_cuts(N, edges, K)]
        assert optimum(costs, edges, K) == min(map(max, sums))


def some_edges(generator: random.Random, N: int, density: float) -> list[tuple[int, int]]:
    pairs = [(a, b) for a in range(N) for b in range(a + 1, N)]
    return [pair for pair in pairs if generator.random() < density]


def stage_costs(costs: Sequence[Fraction], stage_of: Sequence[int], K: int) -> list[Fraction]:
    sums = [Fraction(0)] * K
    for cost, k in zip(costs, stage_of, strict=True):
        sums[k] += cost
    return sums


# ----------------------------------------------------------------------------------- the optimum

KINDS = {
    "small integers": lambda g: g.randint(1, 9),
    "with zeros": lambda g: g.randint(0, 2),
    "equal": lambda g: 5,
    "large integers": lambda g: g.randint(0, 2**60),
    "few large": lambda g: g.choice([1, 1, 1, 2, 30]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_is_the_best_of_all_convex_cuts(kind: str) -> None:
    generator = random.Random(kind)
    for size in range(48):
        N = 1 + size % 12
        edges = some_edges(generator, N, generator.choice([0, 0.05, 0.15, 0.3, 0.6]))
        costs = [KINDS[kind](generator) for _ in range(N)]
        K = generator.randint(1, min(4, N))
        solved = solve(Dag.of(costs, edges), K)
        assert solved.high == solved.low == optimum(list(map(Fraction, costs)), edges, K)
        prefix = list(accumulate((costs[v] for v in solved.orders[-1]), initial=0))
        assert bottleneck(prefix, K) == solved.high


floats = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.2, 0.3]) | st.floats(0, 1e300)


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
            solved = solve(Dag.of(costs, edges), K)
            assert solved.high == solved.low == optimum(list(map(Fraction, costs)), edges, K)


def test_a_chain_is_solved_without_a_search() -> None:
    costs = [random.Random(0).randint(1, 9) for _ in range(3000)]
    solved = solve(Dag.of(costs, [(v, v + 1) for v in range(2999)]), 7)
    assert solved.low == solved.high
    assert solved.steps == 0


def test_without_sets_the_bound_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopipe.passes.partition.order_search.SET_NODES", 3)
    generator = random.Random(8)
    for _ in range(100):
        N = generator.randint(4, 8)
        K, edges = generator.randint(1, 4), some_edges(generator, N, 0.2)
        costs = [generator.randint(1, 9) for _ in range(N)]
        solved = solve(Dag.of(costs, edges), K)
        assert solved.steps == 0
        assert solved.low <= optimum(list(map(Fraction, costs)), edges, K) <= solved.high
        for order in alternatives(Dag.of(costs, edges), K, solved.high):
            assert all(order.index(a) < order.index(b) for a, b in edges)
        assert refutes(Dag.of(costs, edges), K, solved.low - 1)
        assert not refutes(Dag.of(costs, edges), K, solved.high)


def test_work_is_bounded_and_results_are_the_same_again() -> None:
    generator = random.Random(0)
    costs = [generator.randint(1, 10**6) for _ in range(60)]
    edges = some_edges(generator, 60, 0.02)
    first, second = (solve(Dag.of(costs, edges), 7) for _ in range(2))
    assert first == second
    assert first.low < first.high < 1.01 * first.low  # found, not proven
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


# -------------------------------------------------------------------------------------- searches


def side(dag: Dag, K: int = 1, backward: bool = False) -> Side:
    bounds = Bounds.of(dag, K)
    return Side.of(dag.reversed(), bounds.heads[::-1]) if backward else Side.of(dag, bounds.tails)


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
        found = search(side(dag, K, backward), K, best, width=None, steps=10**6)
        assert found.order is not None
        order = [N - 1 - v for v in reversed(found.order)] if backward else found.order
        assert sorted(order) == list(range(N))
        assert all(order.index(a) < order.index(b) for a, b in edges)
        prefix = list(accumulate((costs[v] for v in order), initial=0))
        assert bottleneck(prefix, K) == best
        if best > max(costs):
            found = search(side(dag, K, backward), K, best - 1, width=None, steps=10**6)
            assert (found.order, found.complete) == (None, True)
            assert refutes(dag, K, best - 1)
        assert not refutes(dag, K, best)


def test_a_search_that_leaves_something_out_says_so() -> None:
    costs = [9, 8, 7, 6, 5, 4]  # 13 each in three stages: 9 4 | 8 5 | 7 6
    free = side(Dag.of(costs, []))
    assert search(free, 3, 13, width=None, steps=10**6).order is not None
    assert search(free, 3, 12, width=None, steps=10**6).complete
    short = search(free, 3, 13, width=None, steps=8)
    assert (short.order, short.complete) == (None, False)
    # two stages of 6 hold 2 2 2 | 3 3; of the ideals of one size one alone is not enough
    narrow = side(Dag.of([2, 3, 2, 3, 2], [(0, 1)]))
    assert search(narrow, 2, 6, width=None, steps=10**6).order is not None
    beams = [search(narrow, 2, 6, width=width, steps=10**6) for width in range(1, 9)]
    assert all(beam.order is not None or not beam.complete for beam in beams)
    assert beams[0].order is None
    assert beams[-1].order is not None


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


def test_list_schedules_are_topological_orders_that_fill_stages() -> None:
    generator = random.Random(4)
    for _ in range(50):
        N = generator.randint(1, 20)
        edges, costs = some_edges(generator, N, 0.2), [generator.randint(0, 9) for _ in range(N)]
        dag = Dag.of(costs, edges)
        for order in schedules(dag, max(1, *costs), Bounds.of(dag, 1).tails):
            assert sorted(order) == list(range(N))
            assert all(order.index(a) < order.index(b) for a, b in edges)
    orders = list(schedules(Dag.of([1, 3, 2, 1], []), 4, (1, 3, 2, 1)))
    assert orders == [(3, 2, 0, 1), (1, 0, 2, 3), (1, 0, 2, 3)]


def test_a_list_schedule_that_looks_too_long_is_given_up() -> None:
    costs = [1000] * 400  # each stage takes one and puts the others aside
    assert len(list(schedules(Dag.of(costs, []), 1000, costs))) == 1


# ---------------------------------------------------------------------------------------- bounds


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


# -------------------------------------------------------------------------------------- crossing


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
        solved = solve(dag, K)
        orders = [*solved.orders, *alternatives(dag, K, solved.high)]
        stage_of = least_crossing(dag, nbytes, orders, K, solved.high)
        exact = list(map(Fraction, costs))
        assert max(stage_costs(exact, stage_of, K)) == solved.high
        weights = {
            cut: crossing_bytes(dag, nbytes, cut)
            for cut in convex_cuts(N, edges, K)
            if max(stage_costs(exact, cut, K)) == solved.high
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
