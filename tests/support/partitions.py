"""Graphs to cut, and brute force over all their convex cuts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

from autopipe.passes.partition.cost_graph import CostGraph


def largest(seconds: Sequence[float], starts: Sequence[int]) -> Fraction:
    bounds = [0, *starts, len(seconds)]
    return max(sum(map(Fraction, seconds[a:b]), Fraction(0)) for a, b in pairwise(bounds))


DIAMOND = CostGraph(
    names=("a", "b", "c", "d"),
    seconds=(1.0, 2.0, 3.0, 4.0),
    edges=((0, 1), (0, 2), (1, 3), (2, 3)),
    nbytes=(8, 8, 8, 8),
)


Edges = Sequence[tuple[int, int]]


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


def some_edges(generator: random.Random, N: int, density: float) -> list[tuple[int, int]]:
    pairs = [(a, b) for a in range(N) for b in range(a + 1, N)]
    return [pair for pair in pairs if generator.random() < density]


def stage_costs(costs: Sequence[Fraction], stage_of: Sequence[int], K: int) -> list[Fraction]:
    sums = [Fraction(0)] * K
    for cost, k in zip(costs, stage_of, strict=True):
        sums[k] += cost
    return sums
