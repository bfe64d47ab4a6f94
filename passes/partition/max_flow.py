"""The cheapest cut of a small network (Edmonds and Karp, JACM 19(2), 1972). No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping

Edge = tuple[Hashable, Hashable]


def source_side(edges: Mapping[Edge, float], source: Hashable, sink: Hashable) -> set[Hashable]:
    """The nodes on the source's side of a cut of least capacity; of several the fewest.

    Args:
        edges: (from, to) → capacity >= 0, infinite where it may not be cut.
        source: not parted from everything by infinite edges.
        sink: the other end.
    """
    left: dict[Hashable, dict[Hashable, float]] = {source: {}, sink: {}}
    for (a, b), capacity in edges.items():
        left.setdefault(a, {})[b] = left.get(a, {}).get(b, 0.0) + capacity
        left.setdefault(b, {}).setdefault(a, 0.0)
    while True:
        came: dict[Hashable, Hashable] = {source: source}
        queue = deque([source])
        while queue and sink not in came:
            node = queue.popleft()
            for other, room in left[node].items():
                if room > 0 and other not in came:
                    came[other] = node
                    queue.append(other)
        if sink not in came:
            return set(came)
        path, node = [], sink
        while node != source:
            path.append((came[node], node))
            node = came[node]
        flow = min(left[a][b] for a, b in path)
        assert flow < math.inf, "the source cannot be parted from the sink"
        for a, b in path:
            left[a][b] -= flow
            left[b][a] += flow
