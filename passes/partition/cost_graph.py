"""`CostGraph`: the input of the partitioner, from a measured profile or a captured model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import NoReturn

from autopipe.errors import PartitionError

_NODE = (
    r"(?P<name>\S+) -- (?P<what>.*) -- forward_compute_time=(?P<forward>[^,]+), "
    r"backward_compute_time=(?P<backward>[^,]+), activation_size=(?P<sizes>[^,]+), "
    r"parameter_size=(?P<parameters>[^,\s]+)( -- stage_id=\d+)?"
)
_EDGE = r"\t(\S+) -- (\S+)"


@dataclass(frozen=True)
class CostGraph:
    """A directed acyclic graph with a cost on every node; a node is its index.

    Attributes:
        names: N distinct node names.
        seconds: forward + backward time of each node, N values >= 0.
        edges: (producer, consumer) index pairs, in the order in which consumers become ready.
        nbytes: size of each node's output, N values >= 0, or None if not known.
        parameter_nbytes: size of each node's parameters, N values >= 0, or None if not known.
    """

    names: tuple[str, ...]
    seconds: tuple[float, ...]
    edges: tuple[tuple[int, int], ...] = ()
    nbytes: tuple[int, ...] | None = None
    parameter_nbytes: tuple[int, ...] | None = None

    @classmethod
    def from_pipedream(cls, path: str | PathLike[str]) -> CostGraph:
        """Read a profile measured by PipeDream (arXiv 1806.03377; its ``graph.txt`` files).

        Times are milliseconds in the file and seconds here. Nodes described as ``Input...`` cost
        0: their time is that of loading data. Several output sizes ``[a; b]`` are summed.

        Args:
            path: of the file.

        Raises:
            PartitionError: a line that is neither node nor edge, a name listed twice, or an edge of
                an unknown node.
            OSError: the file cannot be read.
        """
        index: dict[str, int] = {}
        seconds, nbytes, parameters, edges = [], [], [], []
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
                parameters.append(int(float(node["parameters"])))
            except (ValueError, OverflowError):
                _malformed(source, line)
            seconds.append(0.0 if node["what"].startswith("Input") else milliseconds / 1000)
            nbytes.append(sum(sizes))
        for source, line in lines:  # a second pass: an edge may precede its nodes
            if line.startswith("\t"):
                if (edge := re.fullmatch(_EDGE, line)) is None:
                    _malformed(source, line)
                if unknown := [name for name in edge.groups() if name not in index]:
                    raise PartitionError("no such node", node=unknown[0], source=source)
                edges.append((index[edge[1]], index[edge[2]]))
        graph = cls(tuple(index), tuple(seconds), tuple(edges), tuple(nbytes), tuple(parameters))
        graph.verify()
        return graph

    def verify(self) -> None:
        """Check lengths, ranges and values, and that there is no cycle.

        Raises:
            PartitionError: naming the node.
        """
        N = len(self.names)
        for name, count in Counter(self.names).items():
            if count > 1:
                raise PartitionError(f"{count} nodes have the same name", node=name)
        fields: dict[str, Sequence[float] | None] = {
            "seconds": self.seconds,
            "nbytes": self.nbytes,
            "parameter_nbytes": self.parameter_nbytes,
        }
        for field, values in fields.items():
            if values is None:
                continue
            if len(values) != N:
                raise PartitionError(f"{len(values)} {field} for {N} names")
            for name, value in zip(self.names, values, strict=True):
                if not 0 <= value < math.inf:
                    problem = f"{field} must be finite and >= 0"
                    raise PartitionError(problem, node=name, found=str(value))
        for edge in self.edges:
            if not all(0 <= end < N for end in edge):
                raise PartitionError(
                    f"an edge names a node outside the graph of {N} nodes", found=str(edge)
                )
        ready = set(self._kahn())
        if len(ready) < N:
            cycle = " -> ".join(self.names[node] for node in self._cycle(ready))
            raise PartitionError("the graph has a cycle", found=cycle)

    def order(self) -> tuple[int, ...]:
        """The topological order that is cut first, as node indices: Kahn's, newest ready node next.

        A stack follows one branch to its end before it starts the next, so few values cross a cut.
        Deterministic: equal graphs have equal orders.

        Raises:
            PartitionError: the graph is not valid (see `verify`).
        """
        self.verify()
        return tuple(self._kahn())

    def _kahn(self) -> list[int]:
        missing = [0] * len(self.names)
        consumers: list[list[int]] = [[] for _ in self.names]
        for producer, consumer in self.edges:
            missing[consumer] += 1
            consumers[producer].append(consumer)
        ready = [node for node, count in enumerate(missing) if count == 0]
        order = []
        while ready:
            node = ready.pop()
            order.append(node)
            for consumer in consumers[node]:
                missing[consumer] -= 1
                if missing[consumer] == 0:
                    ready.append(consumer)
        return order

    def _cycle(self, ready: set[int]) -> list[int]:
        """One cycle, with its first node again at the end, among the nodes not in `ready`."""
        producer_of = {b: a for a, b in self.edges if a not in ready and b not in ready}
        seen: dict[int, None] = {}
        node = next(iter(producer_of))
        while node not in seen:
            seen[node] = None
            node = producer_of[node]
        path = list(seen)
        return [node, *reversed(path[path.index(node) :])]


def _malformed(source: str, line: str) -> NoReturn:
    wanted = (
        "'name -- what -- forward_compute_time=ms, backward_compute_time=ms, "
        "activation_size=bytes, parameter_size=bytes' or '<tab>name -- name'"
    )
    problem = "not a line of a PipeDream profile"
    raise PartitionError(problem, source=source, expected=wanted, found=repr(line[:80]))
