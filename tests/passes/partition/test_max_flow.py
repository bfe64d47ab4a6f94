"""Cheapest cuts of small networks, against all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest

from autopipe.passes.partition.max_flow import Edge, min_cut_source_side


def capacity(edges: dict[Edge, float], side: set[object]) -> float:
    return sum(c for (a, b), c in edges.items() if a in side and b not in side)


def sides(nodes: list[int], source: int, sink: int) -> Iterator[set[object]]:
    others = [n for n in nodes if n not in (source, sink)]
    for bits in range(1 << len(others)):
        yield {source, *(n for i, n in enumerate(others) if bits >> i & 1)}


def test_cuts_are_cheapest_and_of_these_the_smallest() -> None:
    generator = random.Random(0)
    finite = 0
    for _ in range(500):
        N = generator.randint(2, 7)
        edges: dict[Edge, float] = {
            (a, b): generator.choice([0, 1, 2, 3.5, math.inf])
            for a in range(N)
            for b in range(N)
            if a != b and generator.random() < 0.4
        }
        every = [(capacity(edges, side), side) for side in sides(list(range(N)), 0, N - 1)]
        best = min(cost for cost, _ in every)
        if best == math.inf:
            with pytest.raises(AssertionError, match="source and sink cannot be separated"):
                min_cut_source_side(edges, 0, N - 1)
            continue
        finite += 1
        found = min_cut_source_side(edges, 0, N - 1)
        assert capacity(edges, found) == best
        assert all(found <= side for cost, side in every if cost == best)
    assert finite > 300


def test_a_source_alone() -> None:
    assert min_cut_source_side({}, "s", "t") == {"s"}
