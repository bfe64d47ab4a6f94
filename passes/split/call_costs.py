"""What a cut must know of single calls, at an aim's micro-batch, whatever their order."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from autopipe.errors import OptionError
from autopipe.passes.cost import call_seconds, recomputed_calls, tensor_operands
from autopipe.passes.graph import is_size, tensor_spec
from autopipe.passes.ir import B, InputKind
from autopipe.passes.remat_policies import repeats

from .mincut_estimate import estimate_min_cut

if TYPE_CHECKING:
    import sympy
    from torch import fx

    from autopipe.passes.devices import Device
    from autopipe.passes.ir import Annotated, Input
    from autopipe.passes.remat_policies import Policy

    from .mincut_estimate import MinCutEstimate
    from .objective import Objective


@dataclass(frozen=True, eq=False)
class CallCosts:
    """Facts of the calls of a captured graph, each worked out once.

    Attributes:
        annotated: the graph and its costs.
        aim: what it is to be cut for.
    """

    annotated: Annotated
    aim: Objective
    _sizes: dict[Any, int] = field(default_factory=dict)
    _nbytes: dict[fx.Node, int] = field(default_factory=dict)
    _seconds: dict[tuple[Device, Policy], dict[fx.Node, float]] = field(default_factory=dict)
    _kept: dict[Policy, dict[fx.Node, float]] = field(default_factory=dict)

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
        return recomputed_calls(self.calls, self.annotated.flows)

    @cached_property
    def saved(self) -> set[fx.Node]:
        """What some backward reads."""
        return {source for node in self.calls for source in self.reads(node)}

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """Of what a call is given what its backward reads."""
        flow = self.annotated.flows.get(node.name)
        return [] if flow is None else [tensor_operands(node)[i] for i in flow.saved_operands]

    @cached_property
    def saved_bytes(self) -> dict[fx.Node, int]:
        """Of what each call makes, what autograd keeps."""
        costs = self.annotated.costs
        return {node: self.at_batch(costs[node.name].saved_bytes) for node in self.calls}

    @cached_property
    def parted(self) -> set[fx.Node]:
        """The trained parameters whose uses lie further apart than a stage is long, by the times on
        the first device: they are shared, and gradients for them wait where they are held."""
        each = self.seconds(self.aim.devices[0], "none")
        now, found = 0.0, set()
        first: dict[fx.Node, float] = {}
        longest = math.fsum(each.values()) / self.aim.stages
        for node in self.calls:
            for source in node.all_input_nodes:
                item = self.inputs.get(source.name)
                if item is None or not is_trained(item):
                    continue
                if now - first.setdefault(source, now) > longest:
                    found.add(source)
            now += each[node]
        return found

    def waiting_bytes(self, parameter: fx.Node, in_flight: int) -> int:
        """Of a shared parameter's gradients where it is held: one waits from each other stage, and
        while one is added to their sum both are there and the new sum."""
        if parameter not in self.parted:
            return 0
        return self.nbytes(parameter) * (min(in_flight, self.aim.stages) + 2)

    @cached_property
    def min_cut(self) -> MinCutEstimate:
        """What "min-cut" keeps and runs again, by estimate."""
        costs = self.annotated.costs
        return estimate_min_cut(
            self.calls,
            self.saved_bytes,
            lambda node: self.at_batch(costs[node.name].activation_bytes),
            lambda node: bool(costs[node.name].forward_flops),
            self.reads,
        )

    def kept_bytes(self, policy: Policy) -> dict[fx.Node, float]:
        """Of what each call makes, what a micro-batch in flight keeps (what is received apart)."""
        if policy not in self._kept:
            if policy == "none":
                self._kept[policy] = dict(self.saved_bytes)
            else:
                share, kept = 2.0 - repeats(policy), self.min_cut.kept
                self._kept[policy] = {node: share * kept.get(node, 0) for node in self.calls}
        return self._kept[policy]

    def again_share(self, node: fx.Node, policy: Policy) -> float:
        """How much of a call a backward runs again: cheap calls under "min-cut", all that it can
        under "full". Between the two a knapsack gives up first what is made again with least work:
        half of the bytes for a quarter of it, say."""
        if node not in self.again:
            return 0.0
        share = repeats(policy)
        return min(1.0, share) if node in self.min_cut.again else max(0.0, share - 1.0) ** 2

    def seconds(self, device: Device, policy: Policy) -> dict[fx.Node, float]:
        """Of each call on a device.

        Raises:
            OptionError: the aim's times lack a call.
        """
        if (device, policy) not in self._seconds:
            measured, costs = self.aim.times, self.annotated.costs
            for node in self.calls:
                if measured is not None and node.name not in measured:
                    expected = "a time for each call of the captured graph"
                    raise OptionError("`times` of a cut", node=node.name, expected=expected)
            used = {costs[node.name] for node in self.calls} if measured is None else ()
            times = {cost: call_seconds(cost, device, self.aim.batch) for cost in used}
            found = {}
            for node in self.calls:
                time = times[costs[node.name]] if measured is None else measured[node.name]
                more = self.again_share(node, policy) * time.recompute
                found[node] = time.forward + time.backward + more
            self._seconds[device, policy] = found
        return self._seconds[device, policy]

    def at_batch(self, expr: sympy.Expr) -> int:
        """A size at the aim's micro-batch (expressions are few, nodes are many)."""
        if expr not in self._sizes:
            self._sizes[expr] = int(expr.subs(B, self.aim.batch))
        return self._sizes[expr]

    def nbytes(self, node: fx.Node) -> int:
        """Of a tensor."""
        if node not in self._nbytes:
            self._nbytes[node] = self.at_batch(tensor_spec(node).nbytes)
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
        return node.name in flows and flows[node.name].results_get_grad[index]


def is_trained(item: Input) -> bool:
    """Whether a placeholder is a parameter that an optimizer changes."""
    return item.kind is InputKind.PARAMETER and item.requires_grad
