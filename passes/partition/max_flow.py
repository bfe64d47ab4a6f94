"""Minimum cut of a small network (Edmonds and Karp, JACM 19(2), 1972)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping

Edge = tuple[Hashable, Hashable]
"""(from, to)."""


def min_cut_source_side(
    edges: Mapping[Edge, float], source: Hashable, sink: Hashable
) -> set[Hashable]:
    """The nodes on the source's side of a minimum cut; of several cuts, the one with fewest nodes.

    Args:
        edges: (from, to) → capacity >= 0, infinite where the edge must not be cut.
        source: each path from it to the sink must have an edge of finite capacity.
        sink: the other end.
    """
    residual: dict[Hashable, dict[Hashable, float]] = {source: {}, sink: {}}
    for (a, b), capacity in edges.items():
        residual.setdefault(a, {})[b] = residual.get(a, {}).get(b, 0.0) + capacity
        residual.setdefault(b, {}).setdefault(a, 0.0)
    while True:
        previous: dict[Hashable, Hashable] = {source: source}
        queue = deque([source])
        while queue and sink not in previous:
            node = queue.popleft()
            for other, capacity in residual[node].items():
                if capacity > 0 and other not in previous:
                    previous[other] = node
                    queue.append(other)
        if sink not in previous:
            return set(previous)
        path, node = [], sink
        while node != source:
            path.append((previous[node], node))
            node = previous[node]
        flow = min(residual[a][b] for a, b in path)
        assert flow < math.inf, "source and sink cannot be separated"
        for a, b in path:
            residual[a][b] -= flow
            residual[b][a] += flow
