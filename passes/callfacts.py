"""What a cut must know of single calls, at an aim's micro-batch, whatever their order."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from autopipe.errors import OptionError

from .cost import run_again, seconds
from .graphs import is_size, spec_of
from .ir import B, Kind
from .runs import operands_of

if TYPE_CHECKING:
    import sympy
    from torch import fx

    from .aim import Aim
    from .devices import Device
    from .ir import Annotated, Input


@dataclass(frozen=True, eq=False)
class CallFacts:
    """Facts of the calls of a captured graph, each worked out once.

    Attributes:
        annotated: the graph and its costs.
        aim: what it is to be cut for.
    """

    annotated: Annotated
    aim: Aim
    _sizes: dict[Any, int] = field(default_factory=dict)
    _nbytes: dict[fx.Node, int] = field(default_factory=dict)
    _seconds: dict[tuple[Device, float], dict[fx.Node, float]] = field(default_factory=dict)

    @cached_property
    def calls(self) -> list[fx.Node]:
        """Those that stages make, in the order of the graph (each stage works out sizes itself)."""
        graph = self.annotated.captured.graph_module.graph
        return [n for n in graph.nodes if n.op == "call_function" and not is_size(n)]

    @cached_property
    def inputs(self) -> dict[str, Input]:
        """By name."""
        return {i.name: i for i in self.annotated.captured.inputs}

    @cached_property
    def again(self) -> set[fx.Node]:
        """What a backward runs again (the last calls of a stage may do without)."""
        return run_again(self.calls, self.annotated.flows)

    @cached_property
    def saved(self) -> set[fx.Node]:
        """What some backward reads."""
        flows = self.annotated.flows
        known = [node for node in self.calls if node.name in flows]
        return {operands_of(node)[i] for node in known for i in flows[node.name].saves}

    @cached_property
    def saved_bytes(self) -> dict[fx.Node, int]:
        """Of what each call makes, what autograd keeps."""
        costs = self.annotated.costs
        return {node: self.at_batch(costs[node.name].saved_bytes) for node in self.calls}

    def seconds(self, device: Device, again: float) -> dict[fx.Node, float]:
        """Of each call on a device, if a share of what can be is run again.

        Raises:
            OptionError: the aim's times lack a call.
        """
        if (device, again) not in self._seconds:
            measured, costs = self.aim.times, self.annotated.costs
            for node in self.calls:
                if measured is not None and node.name not in measured:
                    expected = "a time for each call of the captured graph"
                    raise OptionError("`times` of a cut", node=node.name, expected=expected)
            used = {costs[node.name] for node in self.calls} if measured is None else ()
            times = {cost: seconds(cost, device, self.aim.batch) for cost in used}
            found = {}
            for node in self.calls:
                time = times[costs[node.name]] if measured is None else measured[node.name]
                more = again * time.recompute if node in self.again else 0.0
                found[node] = time.forward + time.backward + more
            self._seconds[device, again] = found
        return self._seconds[device, again]

    def at_batch(self, expr: sympy.Expr) -> int:
        """A size at the aim's micro-batch (expressions are few, nodes are many)."""
        if expr not in self._sizes:
            self._sizes[expr] = int(expr.subs(B, self.aim.batch))
        return self._sizes[expr]

    def nbytes(self, node: fx.Node) -> int:
        """Of a tensor."""
        if node not in self._nbytes:
            self._nbytes[node] = self.at_batch(spec_of(node).nbytes)
        return self._nbytes[node]

    def held_bytes(self, item: Input) -> int:
        """Of a parameter, its gradient and optimizer state; of a buffer or constant."""
        size = self.at_batch(item.spec.nbytes)
        state = self.at_batch(item.spec.numel) * self.aim.state_bytes
        return size + (size + state if is_trained(item) else 0)

    def wants_gradient(self, node: fx.Node) -> bool:
        """Whether a gradient comes for a call's tensor (maybe one that it unpacks)."""
        index, flows = 0, self.annotated.flows
        if node.target is operator.getitem:
            source, at = node.args
            node, index = source, at  # type: ignore[assignment]
        return node.name in flows and flows[node.name].gets[index]


def is_trained(item: Input) -> bool:
    """Whether a placeholder is a parameter that an optimizer changes."""
    return item.kind is Kind.PARAMETER and item.requires_grad
