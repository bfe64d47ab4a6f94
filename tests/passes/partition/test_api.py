"""`partition` on graphs and published profiles; partitions broken on purpose."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopipe.errors import OptionError, PartitionError, VerifyError
from autopipe.passes.partition.api import Partition, partition
from autopipe.passes.partition.chain_cut import cut_chain
from autopipe.passes.partition.cost_graph import CostGraph
from tests.support.partitions import DIAMOND, largest

pytestmark = pytest.mark.few(4)

PROFILES = Path(__file__).parents[2] / "data" / "pipedream"


MODELS = sorted(path.stem for path in PROFILES.glob("*.txt") if path.stem != "LICENSE")


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
    contiguous = largest(seconds, cut_chain(seconds, stages))
    assert result.bottleneck <= float(contiguous)
    assert result.lower_bound >= max(*seconds, float(sum(map(Fraction, seconds)) / stages))
