"""The cut against brute force, published profiles, and graphs broken on purpose."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopipe.errors import OptionError, PartitionError, VerifyError
from autopipe.passes.partition.api import Partition, partition
from autopipe.passes.partition.chain_cut import cut
from autopipe.passes.partition.cost_graph import CostGraph

PROFILES = Path(__file__).parents[3] / "data" / "pipedream"
MODELS = sorted(path.stem for path in PROFILES.glob("*.txt") if path.stem != "LICENSE")

# ------------------------------------------------------------------------------- cut: the oracle


def largest(seconds: Sequence[float], starts: Sequence[int]) -> Fraction:
    bounds = [0, *starts, len(seconds)]
    return max(sum(map(Fraction, seconds[a:b]), Fraction(0)) for a, b in pairwise(bounds))


def weight(crossing: Sequence[float], starts: Sequence[int]) -> Fraction:
    return sum((Fraction(crossing[p]) for p in starts), Fraction(0))


def every_cut(N: int, K: int, allowed: Sequence[bool] | None) -> Iterator[tuple[int, ...]]:
    return combinations([p for p in range(1, N) if allowed is None or allowed[p]], K - 1)


def check(
    seconds: Sequence[float],
    K: int,
    allowed: Sequence[bool] | None = None,
    crossing: Sequence[float] | None = None,
    slack: float = 0.0,
) -> None:
    """`cut` gives one of the cuts that brute force, in exact arithmetic, finds best."""
    cuts = list(every_cut(len(seconds), K, allowed))
    if not cuts:
        with pytest.raises(PartitionError):
            cut(seconds, K, allowed=allowed, crossing=crossing, slack=slack)
        return
    starts = cut(seconds, K, allowed=allowed, crossing=crossing, slack=slack)
    assert starts in cuts
    optimum = min(largest(seconds, c) for c in cuts)
    if crossing is None:
        assert largest(seconds, starts) == optimum
        return
    limit = optimum * (1 + Fraction(slack))
    assert largest(seconds, starts) <= limit
    within = [c for c in cuts if largest(seconds, c) <= limit]
    least = min(weight(crossing, c) for c in within)
    assert weight(crossing, starts) == least
    ties = [c for c in within if weight(crossing, c) == least]
    best = min(largest(seconds, c) for c in ties)
    assert largest(seconds, starts) <= best + optimum / 1024
    if slack == 0:
        assert starts == min(ties)


def test_cut_is_optimal_for_every_small_case() -> None:
    for N in range(1, 6):
        for seconds in product((0.0, 1.0, 3.0), repeat=N):
            for K in range(1, N + 2):
                check(seconds, K)


def test_cut_is_optimal_where_neighbouring_integers_differ() -> None:
    """Small whole costs: a search that steps over one integer gives the wrong optimum."""
    generator = random.Random(0)
    for _ in range(400):
        N = generator.randint(4, 9)
        check([float(generator.randint(1, 20)) for _ in range(N)], generator.randint(2, N))


def test_cut_is_optimal_for_every_mask() -> None:
    seconds = (2.0, 0.1, 0.2, 3.0, 0.3, 1.0)
    crossing = (9.0, 2.0, 1.0, 1.0, 3.0, 0.0, 9.0)
    for allowed in product((False, True), repeat=7):
        for K in range(1, 7):
            check(seconds, K, allowed)
            check(seconds, K, allowed, crossing, 0.25)


costs = st.one_of(
    st.integers(0, 5).map(float),
    st.sampled_from([0.1, 0.2, 0.3, 0.7]),
    st.floats(0, 1e3, allow_nan=False),
    st.sampled_from([5e-324, 1e-300, 1e-17, 1e300]),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, list[bool] | None, list[float] | None]:
    N = draw(st.integers(1, 9))
    seconds = draw(st.lists(costs, min_size=N, max_size=N))
    masks = st.lists(st.sampled_from([True, True, False]), min_size=N + 1, max_size=N + 1)
    weights = st.lists(st.integers(0, 3).map(float) | costs, min_size=N + 1, max_size=N + 1)
    K = draw(st.integers(1, N))
    return seconds, K, draw(st.none() | masks), draw(st.none() | weights)


@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.0, 0.1, 0.5, 3.0, 1e300]))
def test_cut_agrees_with_brute_force(
    problem: tuple[list[float], int, list[bool] | None, list[float] | None], slack: float
) -> None:
    seconds, K, allowed, crossing = problem
    check(seconds, K, allowed, crossing, slack)


def test_every_stage_gets_an_item_even_when_all_cost_nothing() -> None:
    assert cut([0.0] * 4, 4) == (1, 2, 3)
    assert cut([1.0, 0.0, 0.0], 3) == (1, 2)
    assert cut([0.0, 0.0, 1.0], 3, crossing=[0.0] * 4) == (1, 2)


def test_integers_longer_than_a_float_are_not_rounded() -> None:
    assert cut([2**60 + 1, 2**60, 1], 2, crossing=[0] * 4) == (1,)
    assert cut([2**60, 2**60 - 1, 1, 1], 2) == (1,)


def test_one_stage_needs_no_cut() -> None:
    assert cut([1.0, 2.0], 1) == ()
    assert cut([1.0], 1, crossing=[5.0, 5.0], slack=1.0) == ()


def test_crossing_decides_between_equal_cuts_and_slack_buys_more() -> None:
    seconds = [1.0] * 6
    crossing = [0.0, 9.0, 9.0, 5.0, 1.0, 9.0, 0.0]
    assert cut(seconds, 2, crossing=crossing) == (3,)
    assert cut(seconds, 2, crossing=crossing, slack=0.34) == (4,)


def test_slack_is_not_spent_for_nothing() -> None:
    assert cut([1.0] * 64, 4, crossing=[1.0] * 65, slack=0.5) == (16, 32, 48)


def test_the_optimum_is_feasible_for_the_second_criterion_whatever_the_rounding() -> None:
    seconds = [0.1] * 10  # prefix sums of floats would give stages of "unequal" cost
    assert cut(seconds, 5, crossing=[1.0] * 11) == (2, 4, 6, 8)


def test_the_ends_of_masks_and_weights_are_ignored() -> None:
    assert cut([1.0, 1.0], 2, allowed=[False, True, False]) == (1,)
    assert cut([1.0, 1.0], 2, crossing=[math.nan, 1.0, math.inf]) == (1,)


def test_too_many_stages_say_how_many_are_possible() -> None:
    with pytest.raises(PartitionError, match=r"4 stages asked for, 3 possible"):
        cut([1.0] * 3, 4)
    with pytest.raises(PartitionError, match=r"3 stages asked for, 2 possible"):
        cut([1.0] * 4, 3, allowed=[True, False, True, False, True])
    with pytest.raises(PartitionError, match=r"1 stages asked for, 0 possible"):
        cut([], 1)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (([1.0], 0), {}),
        (([1.0], -1), {}),
        (([1.0, math.nan], 1), {}),
        (([1.0, -1.0], 1), {}),
        (([1.0, math.inf], 1), {}),
        (([1.0, 1.0], 2), {"allowed": [True]}),
        (([1.0, 1.0], 2), {"crossing": [0.0] * 2}),
        (([1.0, 1.0], 2), {"crossing": [0.0, math.nan, 0.0]}),
        (([1.0, 1.0], 2), {"crossing": [0.0, -1.0, 0.0]}),
        (([1.0, 1.0], 2), {"slack": -0.1}),
        (([1.0, 1.0], 2), {"slack": math.nan}),
    ],
)
def test_cut_refuses_what_is_no_cost(
    arguments: tuple[list[float], int], options: dict[str, list[float]]
) -> None:
    with pytest.raises(OptionError):
        cut(*arguments, **options)  # type: ignore[arg-type]


def test_large_problems_are_quick() -> None:
    generator = random.Random(0)
    seconds = [generator.lognormvariate(0, 1) for _ in range(20_000)]
    crossing = [generator.random() for _ in range(5_001)]
    began = time.perf_counter()
    starts = cut(seconds, 64)
    second = cut(seconds[:5_000], 16, crossing=crossing, slack=0.05)
    assert time.perf_counter() - began < 20  # takes 0.1 s; quadratic code takes minutes
    assert float(largest(seconds, starts)) < 1.01 * sum(seconds) / 64
    assert len(second) == 15


# ------------------------------------------------------------------------------------ CostGraph

DIAMOND = CostGraph(
    names=("a", "b", "c", "d"),
    seconds=(1.0, 2.0, 3.0, 4.0),
    edges=((0, 1), (0, 2), (1, 3), (2, 3)),
    nbytes=(8, 8, 8, 8),
)


def test_order_takes_the_newest_ready_node_first() -> None:
    DIAMOND.verify()
    assert DIAMOND.order() == (0, 2, 1, 3)
    assert CostGraph(("a", "b", "c"), (1.0,) * 3, ((2, 0),)).order() == (2, 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("a", "b", "a", "d")}, "2 nodes have the same name"),
        ({"seconds": (1.0,)}, "1 seconds for 4 names"),
        ({"nbytes": ()}, "0 nbytes for 4 names"),
        ({"seconds": (1.0, 2.0, 3.0, -1.0)}, "node: d"),
        ({"seconds": (1.0, math.nan, 3.0, 1.0)}, "node: b"),
        ({"seconds": (math.inf, 1.0, 3.0, 1.0)}, "node: a"),
        ({"nbytes": (0, 0, -8, 0)}, "nbytes must be finite"),
        ({"edges": ((0, 4),)}, r"\(0, 4\)"),
        ({"edges": ((-1, 0),)}, r"\(-1, 0\)"),
        ({"edges": ((0, 1), (1, 2), (2, 1), (2, 3))}, "found: (b -> c -> b|c -> b -> c)"),
        ({"edges": ((3, 3),)}, "found: d -> d"),
    ],
)
def test_graphs_that_are_not_sound_are_refused(change: dict[str, object], message: str) -> None:
    graph = dataclasses.replace(DIAMOND, **change)  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match=message):
        graph.verify()
    with pytest.raises(PartitionError, match=message):
        partition(graph, 2)


# ------------------------------------------------------------------------------------ Partition


def test_a_partition_of_a_diamond() -> None:
    result = partition(DIAMOND, 2)
    result.verify(DIAMOND)
    assert result == Partition({"a": 0, "b": 1, "c": 0, "d": 1}, (4.0, 6.0), 6.0, 6.0)
    assert result.balance == 5 / 6
    assert str(result).splitlines() == [
        "stage  nodes       seconds  of bottleneck",
        "    0      2             4          0.667",
        "    1      2             6          1.000",
        "bottleneck 6 s, lower bound 6 s (optimal), balance 0.833",
    ]


def test_output_sizes_decide_between_equally_good_cuts() -> None:
    names, edges = ("a", "b", "c", "d"), ((0, 1), (1, 2), (2, 3), (0, 3))
    graph = CostGraph(names, (2.0, 0.0, 0.0, 2.0), edges, nbytes=(1, 50, 7, 50))
    assert dict(partition(graph, 2).stage_of) == {"a": 0, "b": 1, "c": 1, "d": 1}
    graph = dataclasses.replace(graph, nbytes=(100, 50, 7, 50))  # a, still alive, crosses anyway
    assert dict(partition(graph, 2).stage_of) == {"a": 0, "b": 1, "c": 1, "d": 1}
    graph = dataclasses.replace(graph, nbytes=(100, 50, 7, 50), edges=edges[:3])
    assert dict(partition(graph, 2).stage_of) == {"a": 0, "b": 0, "c": 0, "d": 1}


def test_a_graph_that_costs_nothing_is_balanced() -> None:
    graph = CostGraph(("a", "b"), (0.0, 0.0))
    result = partition(graph, 2)
    result.verify(graph)
    assert result.balance == 1.0
    assert "1.000" in str(result)


def test_partition_refuses_impossible_stage_counts() -> None:
    with pytest.raises(PartitionError, match="4 possible"):
        partition(DIAMOND, 5)
    with pytest.raises(OptionError):
        partition(DIAMOND, 0)
    with pytest.raises(PartitionError, match="0 possible"):
        partition(CostGraph((), ()), 1)
    for slack in (-0.1, math.nan, math.inf):
        with pytest.raises(OptionError, match="slack"):
            partition(DIAMOND, 2, slack=slack)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage_of": {"a": 0, "b": 0, "c": 0}}, "node: d"),
        ({"stage_of": {"a": 0, "b": 0, "c": 0, "d": 2}}, "node: d"),
        ({"stage_of": {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1}}, "node: e"),
        ({"stage_of": {"a": 1, "b": 0, "c": 1, "d": 0}}, "an edge goes backward"),
        ({"stage_of": {"a": 1, "b": 1, "c": 1, "d": 1}}, "stage 0 has no node"),
        ({"stage_of": {"a": 0, "b": 0, "c": 0, "d": 1}}, "cost of stage 0"),
        ({"stage_seconds": (4.0, 6.5)}, "cost of stage 1"),
        ({"stage_seconds": (4.0, 6.0, 0.0)}, "stage 2 has no node"),
        ({"bottleneck": 5.0}, "bottleneck"),
        ({"lower_bound": 6.1}, "lower bound is out of range"),
        ({"lower_bound": 4.9}, "lower bound is out of range"),
    ],
)
def test_partitions_that_are_wrong_are_caught(change: dict[str, object], message: str) -> None:
    wrong = dataclasses.replace(partition(DIAMOND, 2), **change)  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match=message):
        wrong.verify(DIAMOND)


def test_a_bound_that_no_search_confirms_is_caught() -> None:
    """6 s are possible, so a partition of 9 s cannot claim that 7 s are the least."""
    poor = Partition({"a": 0, "b": 1, "c": 1, "d": 1}, (1.0, 9.0), 9.0, 6.0)
    poor.verify(DIAMOND)
    assert poor.gap == 0.5
    assert str(poor).splitlines()[-1].startswith("bottleneck 9 s, lower bound 6 s (gap 50.00%)")
    with pytest.raises(VerifyError, match="lower bound is not proven"):
        dataclasses.replace(poor, lower_bound=7.0).verify(DIAMOND)
    chain = dataclasses.replace(DIAMOND, edges=((0, 1), (1, 2), (2, 3)))
    with pytest.raises(VerifyError, match="lower bound is not proven"):
        dataclasses.replace(poor, lower_bound=7.0).verify(chain)


@st.composite
def graphs(draw: st.DrawFn) -> CostGraph:
    N = draw(st.integers(1, 12))
    pairs = [(a, b) for a in range(N) for b in range(a + 1, N)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    seconds = draw(st.lists(st.floats(0, 1), min_size=N, max_size=N))
    rename = draw(st.permutations(range(N)))
    nbytes = draw(st.none() | st.tuples(*[st.integers(0, 9)] * N))
    renamed = tuple((rename[a], rename[b]) for a, b in edges)
    return CostGraph(tuple(map(str, range(N))), tuple(seconds), renamed, nbytes)


@settings(max_examples=100, deadline=None)
@given(graphs(), st.data())
def test_partitions_of_any_graph_verify(graph: CostGraph, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(graph.names)))
    result = partition(graph, stages)
    result.verify(graph)
    assert result.lower_bound <= result.bottleneck
    assert 0 < result.balance <= 1


# ------------------------------------------------------------------------------------ PipeDream


@pytest.mark.parametrize(
    ("model", "balances"),
    [
        ("inception_v3", (1.000, 0.968, 0.936)),
        ("resnet50", (0.999, 0.994, 0.978)),
        ("densenet121", (1.000, 0.995, 0.980)),
        ("squeezenet1_0", (0.990, 0.978, 0.698)),
        ("gnmt", (0.973, 0.864, 0.587)),
        ("vgg16", (0.907, 0.777, 0.527)),
    ],
)
def test_pipedream_profiles_reach_the_proven_optimum(
    model: str, balances: tuple[float, ...]
) -> None:
    """The optima were proven by a solver for integer programmes (HiGHS), not by this code."""
    graph = CostGraph.from_pipedream(PROFILES / f"{model}.txt")
    for stages, balance in zip((2, 4, 8), balances, strict=True):
        result = partition(graph, stages)
        result.verify(graph)
        assert round(result.balance, 3) == balance
        assert result.gap == 0


def test_the_profiles_are_found() -> None:
    assert len(MODELS) == 7


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
@pytest.mark.parametrize("model", MODELS)
def test_profiles_are_within_a_hundredth_of_the_bound(model: str, stages: int) -> None:
    """And never worse than the exact contiguous cut of the graph's own order."""
    graph = CostGraph.from_pipedream(PROFILES / f"{model}.txt")
    result = partition(graph, stages)
    result.verify(graph)
    assert result.gap <= 0.01
    seconds = [graph.seconds[node] for node in graph.order()]
    contiguous = largest(seconds, cut(seconds, stages))
    assert result.bottleneck <= float(contiguous)
    assert result.lower_bound >= max(*seconds, float(sum(map(Fraction, seconds)) / stages))


NODE = (
    "{} -- {} -- forward_compute_time=1.500, backward_compute_time=2.500, "
    "activation_size={}, parameter_size=0.000"
)


def write(folder: Path, *lines: str) -> Path:
    path = folder / "profile.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_profile_is_read_in_seconds_and_bytes(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        NODE.format("node1", "Input0", "4.0"),
        "\tnode1 -- node2",
        "",
        NODE.format("node2", "Linear(1 -- 2)", "[8.0; 16.0]") + " -- stage_id=0",
    )
    graph = CostGraph.from_pipedream(path)
    assert graph == CostGraph(("node1", "node2"), (0.0, 0.004), ((0, 1),), (4, 24), (0, 0))


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        (["node1 -- Linear"], 1, "not a line of a PipeDream profile"),
        ([NODE.format("a", "ReLU", "4"), "\ta -> b"], 2, "not a line of a PipeDream profile"),
        ([NODE.format("a", "ReLU", "many")], 1, "not a line of a PipeDream profile"),
        ([NODE.format("a", "ReLU", "4").replace("1.500", "1.5s")], 1, "not a line"),
        ([NODE.format("a", "ReLU", "inf")], 1, "not a line"),
        ([NODE.format("a", "ReLU", "4"), NODE.format("a", "ReLU", "4")], 2, "listed twice"),
        ([NODE.format("a", "ReLU", "4"), "\ta -- b"], 2, "no such node\n  node: b"),
    ],
)
def test_malformed_lines_are_named(
    tmp_path: Path, lines: list[str], line: int, message: str
) -> None:
    with pytest.raises(PartitionError, match=message) as caught:
        CostGraph.from_pipedream(write(tmp_path, *lines))
    assert caught.value.source == f"{tmp_path / 'profile.txt'}:{line}"


def test_a_profile_with_a_cycle_is_refused(tmp_path: Path) -> None:
    nodes = [NODE.format(name, "ReLU", "4") for name in "ab"]
    with pytest.raises(PartitionError, match="the graph has a cycle"):
        CostGraph.from_pipedream(write(tmp_path, *nodes, "\ta -- b", "\tb -- a"))
