"""Lower bounds on the largest stage that hold for every cut of a DAG into K stages.

`simple_bound` needs only the costs. The others are destructive (Klein and Scholl, "Computing lower
bounds by destructive improvement", EJOR 1999): they assume a limit T and try to refute it, and the
bound is the least T that is not refuted.

- Heads and tails: a node and all its ancestors must fit into the stages up to the node's own, and
  it and all its descendants into the stages from its own on. So each node has an earliest and a
  latest stage, and the nodes that must be in some run of stages must fit into them.
- Bin packing: K bins of T must hold all costs, order or not (Martello and Toth's L2, "Lower bounds
  and reduction procedures for the bin packing problem", Discrete Applied Mathematics 1990; Fekete
  and Schepers' dual feasible functions, "New classes of fast lower bounds for bin packing
  problems", Mathematical Programming 2001).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from .dag import Dag

CLOSURE_NODES = 16_384
"""Up to this many nodes, heads and tails count all ancestors and descendants (N^2 bits: 32 MiB);
for more nodes, only those along the longest path."""

INTERVAL_STAGES = 512
"""Up to this many stages, every run of stages is checked (K^2 sums)."""

FUNCTIONS = 16
"""Dual feasible functions tried."""


def simple_bound(costs: Sequence[int], stages: int) -> int:
    """The largest of: the mean stage; the largest cost; costs that must share a stage.

    Of the K j + 1 largest costs, some stage has at least j + 1; together they cost at least as much
    as the j + 1 smallest of them.

    Args:
        costs: N costs >= 0.
        stages: K.
    """
    bound, sums = -(-sum(costs) // stages), list(accumulate(sorted(costs, reverse=True), initial=0))
    for j, end in enumerate(range(1, len(sums), stages)):
        bound = max(bound, sums[end] - sums[end - j - 1])
    return bound


@dataclass(frozen=True)
class Bounds:
    """Refutes limits on the largest stage of a DAG cut into K stages.

    Attributes:
        stages: K.
        costs: N costs, largest first.
        heads: for each node at most the cost of it and all its ancestors.
        tails: for each node at most the cost of it and all its descendants.
        shift: `units` are the costs divided by 2**shift, rounded down.
        units: for each node, in the order of the graph.
    """

    stages: int
    costs: tuple[int, ...]
    heads: tuple[int, ...]
    tails: tuple[int, ...]
    shift: int
    units: tuple[int, ...]

    @classmethod
    def of(cls, dag: Dag, stages: int) -> Bounds:
        """Compute heads and tails of a graph, O(N^2) bits.

        Args:
            dag: N nodes.
            stages: K.
        """
        shift = max(0, sum(dag.costs).bit_length() - 53)
        units = tuple(cost >> shift for cost in dag.costs)
        tails = _tails(dag, units, shift)
        heads = tuple(reversed(_tails(dag.reversed(), units[::-1], shift)))
        return cls(stages, tuple(sorted(dag.costs, reverse=True)), heads, tails, shift, units)

    def least(self, low: int, high: int) -> int:
        """A T, low <= T <= high, such that no cut has a largest stage below T; found to 2**-24.

        Args:
            low: a lower bound, > 0, at least the largest cost.
            high: not tested itself.
        """
        while high - low > low >> 24:
            limit = (low + high) // 2
            if self.refutes(limit):
                low = limit + 1
            else:
                high = limit
        return low

    def refutes(self, limit: int) -> bool:
        """Whether it is proven that no cut is within a limit.

        Args:
            limit: > 0, at least the largest cost.
        """
        return self._stages_conflict(limit) or any(
            bins > self.stages for bins in bins_needed(self.costs, limit)
        )

    def _stages_conflict(self, limit: int) -> bool:
        """Whether a node's latest stage is before its earliest, or a run of stages is overfull."""
        K = self.stages
        first = [max(1, -(-head // limit)) - 1 for head in self.heads]
        last = [K - max(1, -(-tail // limit)) for tail in self.tails]
        if any(a > b for a, b in zip(first, last, strict=True)):
            return True
        if K > INTERVAL_STAGES:
            return False
        loads = np.zeros((K, K))  # whole numbers below 2**53: exact
        np.add.at(loads, (first, last), self.units)
        # loads[a, b] becomes the sum over the nodes that must be in stages a..b
        loads = np.cumsum(np.cumsum(loads[::-1], axis=0)[::-1], axis=1)
        return any(
            int(loads.diagonal(n - 1).max()) > (n * limit) >> self.shift for n in range(1, K + 1)
        )


def _tails(dag: Dag, units: Sequence[int], shift: int) -> tuple[int, ...]:
    """For each node at most the cost of it and all its descendants."""
    N = len(dag.costs)
    if N > CLOSURE_NODES:
        longest = [0] * N
        for v in reversed(range(N)):
            longest[v] = dag.costs[v] + max((longest[u] for u in dag.after[v]), default=0)
        return tuple(longest)
    sets = [0] * N
    for v in reversed(range(N)):
        sets[v] = 1 << v
        for u in dag.after[v]:
            sets[v] |= sets[u]
    weights, row, tails = np.array(units, dtype=np.float64), -(-N // 8), []
    for at in range(0, N, 256):
        part = b"".join(each.to_bytes(row, "little") for each in sets[at : at + 256])
        packed = np.frombuffer(part, np.uint8).reshape(-1, row)
        bits = np.unpackbits(packed, axis=1, count=N, bitorder="little")
        tails += [int(tail) << shift for tail in (bits.astype(np.float64) @ weights).tolist()]
    return tuple(tails)


def bins_needed(costs: Sequence[int], limit: int) -> Iterator[int]:
    """Lower bounds on the number of bins that hold all costs.

    Args:
        costs: largest first.
        limit: size of a bin.
    """
    upward = costs[::-1]
    sums = list(accumulate(upward, initial=0))
    N = len(costs)
    half = bisect_right(upward, limit // 2)  # from here on, no two fit in one bin
    for at in range(half if half < N else 0):  # L2, with the threshold upward[at] <= limit / 2
        if at and upward[at] == upward[at - 1]:
            continue
        alone = bisect_right(upward, limit - upward[at])  # from here on, none shares a bin
        free = (alone - half) * limit - (sums[alone] - sums[half])
        yield N - half + max(0, -(-(sums[half] - sums[at] - free) // limit))
    yield N - half
    for k in range(1, FUNCTIONS + 1):
        total = 0
        for cost in upward[bisect_left(upward, -(-limit // (k + 1))) :]:
            parts, rest = divmod((k + 1) * cost, limit)
            total += parts * limit if rest else k * cost
        yield -(-total // (k * limit))
