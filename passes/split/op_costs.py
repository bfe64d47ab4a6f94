"""Per-op costs at the planned micro-batch size; they do not depend on the order of the ops.

Both estimates of a stage are sums of these: the cost tables for the exact cut of an order
(`stage_loads`), and the estimate of any assignment of ops to stages (`stage_estimate`).

Time of a stage: forward and backward of its ops, what its policy recomputes, and the transfers over
its left boundary: each value that it receives, and the gradient that it sends back for it. (The
sender is not charged.) A parameter that an earlier stage owns arrives once a step, which is not
counted, but its gradient is sent back with every micro-batch; if sums need not be `exact`, once a
step, too. Inputs of the model are not counted.

Memory of a stage, an estimate for the search (tracing the stage gives the true figure):

- a parameter, and if it is trained its gradient and optimizer state, in the first stage that uses
  it; its value and gradient in each other stage that uses it; buffers and constants in each stage
  that uses them;
- gradients of a shared parameter that are queued in its first stage to be summed, if they are sent
  with every micro-batch (a parameter counts as shared if its first and last use are farther apart
  than a stage is long);
- for one micro-batch, everything that autograd would save, whether the policy saves or recomputes
  it: the backward needs it all;
- for each further micro-batch in flight, what the policy saves;
- for each micro-batch in flight the values that the stage receives, if the policy recomputes from
  them or if some backward reads them.
"""

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
from autopipe.passes.remat_policies import NONE, OpEstimate

from .min_cut_estimate import estimate_min_cut

if TYPE_CHECKING:
    import sympy
    from torch import fx

    from autopipe.passes.devices import Device, Link
    from autopipe.passes.ir import Annotated, Input
    from autopipe.passes.remat_policies import RematPolicy

    from .min_cut_estimate import MinCutEstimate
    from .objective import Objective


@dataclass(frozen=True)
class IncomingValue:
    """A value that a stage uses but neither computes nor owns: its transfers and its memory there.

    Attributes:
        nbytes: its size.
        sent: whether another stage sends it with every micro-batch.
        has_gradient: whether it gets a gradient.
        returned: whether the gradient is sent back with every micro-batch.
        read_by_backward: whether some backward reads it.
        is_state: whether it is a parameter, buffer or constant, which the stage has a copy of.
    """

    nbytes: int
    sent: bool
    has_gradient: bool
    returned: bool
    read_by_backward: bool
    is_state: bool

    def seconds(self, link: Link) -> float:
        """Time of a micro-batch's transfers."""
        return (self.sent + self.returned) * link.seconds(self.nbytes)

    def memory(self, policy: RematPolicy, in_flight: int) -> int:
        """Bytes that the stage needs for it: copies, saved micro-batches, or the state's gradient.

        Args:
            policy: the stage's.
            in_flight: micro-batches whose saved values the stage stores at once.
        """
        if self.is_state:
            return self.nbytes * (1 + self.has_gradient)
        is_saved = self.read_by_backward or policy.saves_received
        return self.nbytes * in_flight if is_saved else 0


def activation_bytes(saved: float, saved_in_flight: float, in_flight: int) -> int:
    """Bytes of activations: one micro-batch in its backward, and the saved values of the others.

    Args:
        saved: bytes that autograd saves of a micro-batch.
        saved_in_flight: bytes that the policy saves of each further one.
        in_flight: micro-batches at once.
    """
    return math.ceil(saved + (in_flight - 1) * saved_in_flight)


@dataclass(frozen=True, eq=False)
class OpCosts:
    """Costs of the ops of a captured graph, each computed once.

    Attributes:
        annotated: the graph, and the costs of its ops as expressions in the batch size.
        objective: the micro-batch size, devices and measured times.
    """

    annotated: Annotated
    objective: Objective
    _sizes: dict[Any, int] = field(default_factory=dict)
    _nbytes: dict[fx.Node, int] = field(default_factory=dict)
    _incoming: dict[fx.Node, IncomingValue] = field(default_factory=dict)
    _seconds: dict[tuple[Device, RematPolicy], dict[fx.Node, float]] = field(default_factory=dict)
    _saved: dict[RematPolicy, dict[fx.Node, float]] = field(default_factory=dict)

    @cached_property
    def ops(self) -> list[fx.Node]:
        """The ops that are assigned to stages, in graph order.

        (Sizes are not included: each stage computes those that it needs.)
        """
        graph = self.annotated.captured.graph_module.graph
        return [n for n in graph.nodes if n.op == "call_function" and not is_size(n)]

    @cached_property
    def inputs(self) -> dict[str, Input]:
        """The graph's placeholders by name."""
        return {i.name: i for i in self.annotated.captured.inputs}

    @cached_property
    def recomputable(self) -> set[fx.Node]:
        """Ops that may have to be recomputed: some backward needs their results."""
        return recomputed_calls(self.ops, self.annotated.flows)

    @cached_property
    def read_by_backward(self) -> set[fx.Node]:
        """Values that the backward of some op reads."""
        return {source for node in self.ops for source in self.backward_reads(node)}

    def backward_reads(self, node: fx.Node) -> list[fx.Node]:
        """The operands of an op that its backward reads."""
        flow = self.annotated.flows.get(node.name)
        return [] if flow is None else [tensor_operands(node)[i] for i in flow.saved_operands]

    @cached_property
    def saved_bytes(self) -> dict[fx.Node, int]:
        """By op, bytes of its results that autograd saves."""
        costs = self.annotated.costs
        return {node: self.at_batch(costs[node.name].saved_bytes) for node in self.ops}

    @cached_property
    def min_cut(self) -> MinCutEstimate:
        """What a min-cut is estimated to save and to recompute."""
        costs = self.annotated.costs
        return estimate_min_cut(
            self.ops,
            self.saved_bytes,
            lambda node: self.at_batch(costs[node.name].activation_bytes),
            lambda node: bool(costs[node.name].forward_flops),
            self.backward_reads,
        )

    @cached_property
    def _estimates(self) -> dict[fx.Node, OpEstimate]:
        """By op, the estimates that rematerialization policies use."""
        saved, found = self.saved_bytes, self.min_cut
        return {
            node: OpEstimate(saved[node], found.saved_bytes.get(node, 0), node in found.recomputed)
            for node in self.ops
        }

    def saved_bytes_in_flight(self, policy: RematPolicy) -> dict[fx.Node, float]:
        """By op, bytes of its results that a further micro-batch in flight saves."""
        if policy not in self._saved:
            estimates = self._estimates
            self._saved[policy] = {n: policy.saved_bytes(e) for n, e in estimates.items()}
        return self._saved[policy]

    def seconds(self, device: Device, policy: RematPolicy) -> dict[fx.Node, float]:
        """By op, time of its forward, backward and recomputation on a device.

        Raises:
            OptionError: the objective's measured times lack an op.
        """
        if (device, policy) not in self._seconds:
            measured, costs = self.objective.times, self.annotated.costs
            for node in self.ops:
                if measured is not None and node.name not in measured:
                    expected = "a time for each op of the captured graph"
                    raise OptionError("`times` of a cut", node=node.name, expected=expected)
            used = {costs[node.name] for node in self.ops} if measured is None else ()
            times = {cost: call_seconds(cost, device, self.objective.batch) for cost in used}
            found, again, estimates = {}, self.recomputable, self._estimates
            for node in self.ops:
                time = times[costs[node.name]] if measured is None else measured[node.name]
                share = policy.recomputed_share(estimates[node]) if node in again else 0.0
                found[node] = time.forward + time.backward + share * time.recompute
            self._seconds[device, policy] = found
        return self._seconds[device, policy]

    def incoming(self, node: fx.Node) -> IncomingValue:
        """A value, for the stages that use it but neither compute nor own it."""
        if node not in self._incoming:
            item = self.inputs.get(node.name)
            is_state = item is not None and item.kind is not InputKind.INPUT
            has_gradient = self.gets_gradient(node) if item is None else is_trained(item)
            self._incoming[node] = IncomingValue(
                nbytes=self.nbytes(node),
                sent=item is None,
                has_gradient=has_gradient,
                returned=has_gradient and (item is None or self.objective.exact),
                read_by_backward=node in self.read_by_backward,
                is_state=is_state,
            )
        return self._incoming[node]

    def owned_bytes(self, node: fx.Node, in_flight: int) -> int:
        """Bytes of a parameter, buffer or constant in the first stage that uses it.

        Args:
            node: its placeholder.
            in_flight: micro-batches whose saved values that stage stores at once.

        Returns:
            The value; if it is trained, also its gradient, optimizer state and queued gradients.
        """
        item = self.inputs[node.name]
        size = self.at_batch(item.spec.nbytes)
        state = self.at_batch(item.spec.numel) * self.objective.state_bytes
        own = size + (size + state if is_trained(item) else 0)
        if not self.objective.exact or node not in self.shared_parameters:
            return own
        # Each other stage has a queued gradient; while one is added, there are two sums.
        return own + self.nbytes(node) * (min(in_flight, self.objective.stages) + 2)

    @cached_property
    def shared_parameters(self) -> set[fx.Node]:
        """Trained parameters whose first and last use are farther apart than a stage is long.

        They will be used by several stages. Lengths are times on the first device.
        """
        each = self.seconds(self.objective.devices[0], NONE)
        now, found = 0.0, set()
        first: dict[fx.Node, float] = {}
        longest = math.fsum(each.values()) / self.objective.stages
        for node in self.ops:
            for source in node.all_input_nodes:
                item = self.inputs.get(source.name)
                if item is None or not is_trained(item):
                    continue
                if now - first.setdefault(source, now) > longest:
                    found.add(source)
            now += each[node]
        return found

    def at_batch(self, expr: sympy.Expr) -> int:
        """A size at the objective's micro-batch size (expressions are few, nodes are many)."""
        if expr not in self._sizes:
            self._sizes[expr] = int(expr.subs(B, self.objective.batch))
        return self._sizes[expr]

    def nbytes(self, node: fx.Node) -> int:
        """Bytes of a tensor."""
        if node not in self._nbytes:
            self._nbytes[node] = self.at_batch(tensor_spec(node).nbytes)
        return self._nbytes[node]

    def gets_gradient(self, node: fx.Node) -> bool:
        """Whether an op's result (or one of several, which `node` unpacks) gets a gradient."""
        index, flows = 0, self.annotated.flows
        if node.target is operator.getitem:
            source, at = node.args
            node, index = source, at  # type: ignore[assignment]
        return node.name in flows and flows[node.name].results_get_grad[index]


def is_trained(item: Input) -> bool:
    """Whether a placeholder is a parameter that an optimizer changes."""
    return item.kind is InputKind.PARAMETER and item.requires_grad
