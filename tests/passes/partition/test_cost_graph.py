"""Cost graphs: their order, invalid ones, and PipeDream profiles that are read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from autopipe.errors import PartitionError
from autopipe.passes.partition.api import partition
from autopipe.passes.partition.cost_graph import CostGraph
from tests.support.partitions import DIAMOND


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
