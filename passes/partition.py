"""Where to cut: an exact min-max cut of a cost graph into stages.

A pipeline is as slow as its slowest stage, so the cut minimises the largest stage (GPipe, arXiv
1811.06965, section 2.2, minimises the variance by a heuristic instead). Cuts are contiguous along
one topological order. That loses nothing in principle, since every acyclic K-split is a contiguous
cut of *some* order, and for one order the optimum is cheap: exact bisection (Pinar and Aykanat,
"Fast optimal load balancing algorithms for 1D partitioning", JPDC 2004) on prefix sums.

All comparisons are between integers. A float is an integer over a power of two, so costs are
scaled to integers without rounding; the optimum found is the optimum, and never "infeasible by one
ulp" when a second criterion (the bytes that cross a cut) is optimised under it. This file knows no
torch: it takes measured profiles as well as captured models.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from os import PathLike
from typing import NoReturn

from autopipe.errors import PartitionError, VerifyError

from .cuts import cut

_NODE = (
    r"(?P<name>\S+) -- (?P<what>.*) -- forward_compute_time=(?P<forward>[^,]+), "
    r"backward_compute_time=(?P<backward>[^,]+), activation_size=(?P<sizes>[^,]+), "
    r"parameter_size=[^,\s]+( -- stage_id=\d+)?"
)
_EDGE = r"\t(\S+) -- (\S+)"


@dataclass(frozen=True)
class CostGraph:
    """A directed acyclic graph with a cost on every node; nodes are known by their index.

    Attributes:
        names: N distinct node names.
        seconds: forward + backward time of each node, N values >= 0.
        edges: (producer, consumer) index pairs, in the order in which consumers become ready.
        nbytes: size of each node's output, N values >= 0, or None if not known.
    """

    names: tuple[str, ...]
    seconds: tuple[float, ...]
    edges: tuple[tuple[int, int], ...] = ()
    nbytes: tuple[int, ...] | None = None

    @classmethod
    def from_pipedream(cls, path: str | PathLike[str]) -> CostGraph:
        """Read a profile measured by PipeDream (arXiv 1806.03377; its ``graph.txt`` files).

        Times are milliseconds in the file and seconds here. Nodes described as ``Input...`` cost
        nothing: theirs is the time to load data. Several output sizes ``[a; b]`` are added up.

        Raises:
            PartitionError: a line that is neither node nor edge, a name given twice or never.
            OSError: the file cannot be read.
        """
        index: dict[str, int] = {}
        seconds, nbytes, edges = [], [], []
        with open(path, encoding="utf-8") as file:
            lines = [(f"{path}:{n}", line.rstrip()) for n, line in enumerate(file, 1)]
        for source, line in lines:
            if not line or line.startswith("\t"):
                continue
            if (node := re.fullmatch(_NODE, line)) is None:
                _malformed(source, line)
            if node["name"] in index:
                raise PartitionError("a node is listed twice", node=node["name"], source=source)
            index[node["name"]] = len(index)
            try:
                milliseconds = float(node["forward"]) + float(node["backward"])
                sizes = [int(float(size)) for size in node["sizes"].strip("[]").split(";")]
            except (ValueError, OverflowError):
                _malformed(source, line)
            seconds.append(0.0 if node["what"].startswith("Input") else milliseconds / 1000)
            nbytes.append(sum(sizes))
        for source, line in lines:  # once more: an edge may stand before its nodes
            if line.startswith("\t"):
                if (edge := re.fullmatch(_EDGE, line)) is None:
                    _malformed(source, line)
                if unknown := [name for name in edge.groups() if name not in index]:
                    raise PartitionError("no such node", node=unknown[0], source=source)
                edges.append((index[edge[1]], index[edge[2]]))
        graph = cls(tuple(index), tuple(seconds), tuple(edges), tuple(nbytes))
        graph.verify()
        return graph

    def verify(self) -> None:
        """Check lengths, ranges and values, and that there is no cycle.

        Raises:
            PartitionError: naming the node concerned.
        """
        N = len(self.names)
        for name, count in Counter(self.names).items():
            if count > 1:
                raise PartitionError(f"{count} nodes have the same name", node=name)
        nbytes = (0,) * N if self.nbytes is None else self.nbytes
        for what, values in (("seconds", self.seconds), ("nbytes", nbytes)):
            if len(values) != N:
                raise PartitionError(f"{len(values)} {what} for {N} names")
            for name, value in zip(self.names, values, strict=True):
                if not 0 <= value < math.inf:
                    problem = f"{what} must be finite and >= 0"
                    raise PartitionError(problem, node=name, found=str(value))
        for edge in self.edges:
            if not all(0 <= end < N for end in edge):
                raise PartitionError(f"an edge of {N} nodes leaves the graph", found=str(edge))
        ready = set(self._kahn())
        if len(ready) < N:
            cycle = " -> ".join(self.names[node] for node in self._cycle(ready))
            raise PartitionError("the graph has a cycle", found=cycle)

    def order(self) -> tuple[int, ...]:
        """The topological order that is cut, as node indices: Kahn's, newest ready node first.

        A stack follows one branch to its end before it starts the next, so a cut crosses few
        values. Equal graphs have equal orders.

        Raises:
            PartitionError: the graph is not sound (see `verify`).
        """
        self.verify()
        return tuple(self._kahn())

    def _kahn(self) -> list[int]:
        waits = [0] * len(self.names)
        consumers: list[list[int]] = [[] for _ in self.names]
        for producer, consumer in self.edges:
            waits[consumer] += 1
            consumers[producer].append(consumer)
        ready = [node for node, count in enumerate(waits) if count == 0]
        order = []
        while ready:
            node = ready.pop()
            order.append(node)
            for consumer in consumers[node]:
                waits[consumer] -= 1
                if waits[consumer] == 0:
                    ready.append(consumer)
        return order

    def _cycle(self, ready: set[int]) -> list[int]:
        """One cycle, its first node again at the end; the nodes not in `ready` wait for one."""
        awaited = {b: a for a, b in self.edges if a not in ready and b not in ready}
        seen: dict[int, None] = {}
        node = next(iter(awaited))
        while node not in seen:
            seen[node] = None
            node = awaited[node]
        path = list(seen)
        return [node, *reversed(path[path.index(node) :])]


@dataclass(frozen=True)
class Partition:
    """Which stage each node is in, and how good that is.

    Attributes:
        stage_of: node name to stage index.
        stage_seconds: K stage costs.
        bottleneck: seconds of the largest stage.
        lower_bound: seconds that no K-split of these nodes can beat, contiguous or not.
    """

    stage_of: Mapping[str, int]
    stage_seconds: tuple[float, ...]
    bottleneck: float
    lower_bound: float

    @property
    def balance(self) -> float:
        """Mean stage / largest stage, 1 at best: the factor on a pipeline's speed-up."""
        mean = math.fsum(self.stage_seconds) / len(self.stage_seconds)
        return min(1.0, mean / self.bottleneck) if self.bottleneck else 1.0

    def __str__(self) -> str:
        count = Counter(self.stage_of.values())
        lines = ["stage  nodes       seconds  of bottleneck"]
        for stage, seconds in enumerate(self.stage_seconds):
            share = seconds / self.bottleneck if self.bottleneck else 1.0
            lines.append(f"{stage:5}  {count[stage]:5}  {seconds:12.6g}  {share:13.3f}")
        bound = f"bottleneck {self.bottleneck:.6g} s, lower bound {self.lower_bound:.6g} s"
        return "\n".join([*lines, f"{bound}, balance {self.balance:.3f}"])

    def verify(self, graph: CostGraph) -> None:
        """Check this partition against the graph it was made from.

        Raises:
            VerifyError: a node in no stage or out of range, an empty stage, an edge that goes
                backward, or sums that do not agree.
        """
        K = len(self.stage_seconds)
        costs: list[list[float]] = [[] for _ in range(K)]
        for name in self.stage_of.keys() - set(graph.names):
            raise VerifyError("a node is not in the graph", node=name)
        for name, seconds in zip(graph.names, graph.seconds, strict=True):
            stage = self.stage_of.get(name, -1)
            if not 0 <= stage < K:
                raise VerifyError(f"a node is in none of {K} stages", node=name, found=str(stage))
            costs[stage].append(seconds)
        for producer, consumer in graph.edges:
            a, b = graph.names[producer], graph.names[consumer]
            if self.stage_of[a] > self.stage_of[b]:
                found = f"{a} in stage {self.stage_of[a]}, {b} in stage {self.stage_of[b]}"
                raise VerifyError("an edge goes backward", node=b, found=found)
        for stage, values in enumerate(costs):
            if not values:
                raise VerifyError(f"stage {stage} has no node")
            _agree(f"cost of stage {stage}", math.fsum(values), self.stage_seconds[stage])
        _agree("bottleneck", max(self.stage_seconds), self.bottleneck)
        _agree("lower bound", _lower_bound(graph.seconds, K), self.lower_bound)


def partition(costs: CostGraph, stages: int) -> Partition:
    """Cut a cost graph into `stages` stages, the largest as small as its `order()` allows.

    Where output sizes are known, the cut with the least bytes crossing it is taken among the
    optimal ones (a value that passes over a stage counts once for each boundary it crosses).

    Raises:
        OptionError: `stages` < 1.
        PartitionError: the graph is not sound, or has fewer nodes than `stages`.
    """
    order = costs.order()
    crossing = None if costs.nbytes is None else _crossing(costs, costs.nbytes, order)
    starts = cut([costs.seconds[node] for node in order], stages, crossing=crossing)
    stage_of = {costs.names[node]: bisect_right(starts, at) for at, node in enumerate(order)}
    members: list[list[float]] = [[] for _ in range(stages)]
    for name, seconds in zip(costs.names, costs.seconds, strict=True):
        members[stage_of[name]].append(seconds)
    sums = tuple(math.fsum(values) for values in members)
    return Partition(stage_of, sums, max(sums), _lower_bound(costs.seconds, stages))


def _crossing(graph: CostGraph, nbytes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Bytes alive across each position 0..N of the order: made before it, used at or after it."""
    place = {node: at for at, node in enumerate(order)}
    last = dict(place)
    for producer, consumer in graph.edges:
        last[producer] = max(last[producer], place[consumer])
    change = [0] * (len(order) + 2)
    for node, size in enumerate(nbytes):
        change[place[node] + 1] += size
        change[last[node] + 1] -= size
    return list(accumulate(change))[: len(order) + 1]


def _lower_bound(seconds: Sequence[float], K: int) -> float:
    """max(sum / K, largest), correctly rounded: so never above a correctly rounded bottleneck."""
    total = sum(map(Fraction, seconds), Fraction(0))
    return max(float(total / K), *seconds)


def _agree(what: str, expected: float, found: float) -> None:
    if not math.isclose(expected, found, rel_tol=1e-9):
        raise VerifyError(f"{what} is wrong", expected=f"{expected!r} s", found=f"{found!r} s")


def _malformed(source: str, line: str) -> NoReturn:
    wanted = (
        "'name -- what -- forward_compute_time=ms, backward_compute_time=ms, "
        "activation_size=bytes, parameter_size=bytes' or '<tab>name -- name'"
    )
    problem = "not a line of a PipeDream profile"
    raise PartitionError(problem, source=source, expected=wanted, found=repr(line[:80]))
