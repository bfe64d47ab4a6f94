"""Find which values of a captured graph need a gradient, and which get one.

A value needs a gradient if it is computed from a parameter or input that requires one. A forward
walk finds these values: it runs each op and asks autograd. A value gets a gradient if one flows to
it from the outputs that the program differentiates. A backward walk finds these. A frozen part of a
model gets none, and a first layer computes none for its input.

In-place writes are tracked by memory: a value that is read after a write depends on it.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.passes._torch import OpOverload, storage_id
from autopipe.passes.graph import is_size, symbolic_size, tensors_of, written_arguments
from autopipe.passes.ir import Captured, GradFlow, results_of

from .call_cache import DistinctCall, Flags
from .meta_run import tensor_operands
from .op_counter import PROBE_BATCHES

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from autopipe.passes.kernels import Capability


class GradientAnalysis:
    """The gradients of one captured graph.

    Attributes:
        call_of: for each op with a cost, its `DistinctCall`.
        flows: for each op with a cost, which of its operands and results have gradients.
        saved_storages: identities of the storages that autograd saves for the backward.
        gradient_count: for each value, the number of gradients that are summed for it.
    """

    def __init__(self, captured: Captured, kernels: Capability | None = None) -> None:
        self.captured, self._kernels = captured, kernels
        self.call_of: dict[fx.Node, DistinctCall] = {}
        self.flows: dict[fx.Node, GradFlow] = {}
        self.saved_storages: set[int] = set()
        self.gradient_count: Counter[fx.Node] = Counter()
        self._nodes = list(captured.graph_module.graph.nodes)
        self._distinct: dict[Hashable, DistinctCall] = {}
        self._metadata: dict[fx.Node, Hashable] = {}
        self._needs: dict[fx.Node, Flags] = {}
        self._gets: dict[fx.Node, list[bool]] = {}
        self._last_writer: dict[int, fx.Node] = {}  # by storage identity
        self._earlier_writers: dict[fx.Node, list[fx.Node]] = {}  # of what an op reads

    def run(self) -> None:
        """Walk the graph forward, then backward."""
        self._walk_forward()
        for node in _differentiated(self.captured, self._needs):
            self._add_gradient(node, self._needs[node])
        self._walk_backward()

    # ------------------------------------------------------------------ which need a gradient

    def _walk_forward(self) -> None:
        wanted = {i.name for i in self.captured.inputs if i.requires_grad}
        for node in self._nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                self._needs[node] = (node.name in wanted,)
            elif is_size(node):
                self._needs[node] = (False,)
            elif not isinstance(node.target, OpOverload):
                self._needs[node] = self._needs_of_python_function(node)
            else:
                self._needs[node] = self._needs_of_operator(node)

    def _needs_of_python_function(self, node: fx.Node) -> Flags:
        """`getitem` selects one of several results; other functions are assumed differentiable."""
        if node.target is operator.getitem and isinstance(node.args[1], int):
            source: Any = node.args[0]
            if isinstance(node.meta["val"], Tensor) or node.meta["val"] is None:
                return (self._needs[source][node.args[1]],)
        return _flags_like(node, any(any(self._needs[n]) for n in tensor_operands(node)))

    def _needs_of_operator(self, node: fx.Node) -> Flags:
        operands = tensor_operands(node)
        # The last write to the memory that is read; that write depends on the earlier ones.
        writers = {
            n: [self._last_writer[s] for s in _storages(n) if s in self._last_writer]
            for n in operands
        }
        self._earlier_writers[node] = [w for n, ws in writers.items() for w in ws if w is not n]
        needs = tuple(
            _flags_like(n, True) if any(any(self._needs[w]) for w in writers[n]) else self._needs[n]
            for n in operands
        )
        key = self._key(node, needs)
        if key not in self._distinct:
            self._distinct[key] = DistinctCall.first_run(node, needs, self._kernels)
        self.call_of[node] = call = self._distinct[key]
        for n in written_arguments(node):
            self._last_writer.update(dict.fromkeys(_storages(n), node))
        if call.failed:
            return _flags_like(node, any(map(any, needs)))
        return call.run(PROBE_BATCHES[0]).results_need_grad

    def _key(self, node: fx.Node, needs: tuple[Flags, ...]) -> Hashable:
        """A key that is the same for equal ops (see `call_cache`)."""
        position = {n: i for i, n in enumerate(tensor_operands(node))}

        def describe(value: Any) -> Hashable:
            if isinstance(value, fx.Node):
                if value not in self._metadata:
                    self._metadata[value] = _metadata(value)
                return (position.get(value), self._metadata[value])
            if isinstance(value, (tuple, list)):
                return tuple(map(describe, value))
            if isinstance(value, dict):
                return tuple((k, describe(v)) for k, v in value.items())
            return str(value)

        owned = self.operand_storages(node)
        aliases = tuple(s in owned for s in _storages(node))
        return (node.target, describe(node.args), describe(node.kwargs), needs, aliases)

    def operand_storages(self, node: fx.Node) -> set[int]:
        """Return the identities of the storages of an op's operands."""
        return {s for n in tensor_operands(node) for s in _storages(n)}

    # ------------------------------------------------------------------ which get one

    def _add_gradient(self, node: fx.Node, flags: Sequence[bool]) -> None:
        """Note that a gradient arrives for (some tensors of) a node."""
        if any(flags):
            before = self._gets.get(node, [False] * len(flags))
            self._gets[node] = [a or b for a, b in zip(before, flags, strict=True)]
            self.gradient_count[node] += 1

    def _walk_backward(self) -> None:
        for node in reversed(self._nodes):
            if node.op != "call_function":
                continue
            needs = self._needs[node]
            arrived = self._gets.get(node, [False] * len(needs))
            results_get_grad = tuple(a and b for a, b in zip(arrived, needs, strict=True))
            if node not in self.call_of:
                self._pass_through(node, results_get_grad)
                continue
            self.flows[node] = self.call_of[node].grad_flow(results_get_grad)
            if any(results_get_grad):
                self._pass_backward(node, results_get_grad)

    def _pass_through(self, node: fx.Node, results_get_grad: Flags) -> None:
        """Pass gradients through a Python function, such as `getitem`."""
        if not any(results_get_grad):
            return
        for n in tensor_operands(node):
            part = node.args[1] if node.target is operator.getitem else None
            if isinstance(part, int):
                self._add_gradient(n, [i == part for i in range(len(self._needs[n]))])
            else:
                self._add_gradient(n, self._needs[n])

    def _pass_backward(self, node: fx.Node, results_get_grad: Flags) -> None:
        """Pass gradients to an op's operands, and record what is saved for its backward."""
        operands, call = tensor_operands(node), self.call_of[node]
        for n, flags in zip(operands, call.operands_get_grad(results_get_grad), strict=True):
            self._add_gradient(n, flags)
        for writer in self._earlier_writers[node]:
            self._gets[writer] = list(self._needs[writer])
        for i in self.flows[node].saved_operands:
            self.saved_storages.update(_storages(operands[i]))
        if call.saves_results:
            self.saved_storages.update(_storages(node))


def _differentiated(captured: Captured, needs: Mapping[fx.Node, Flags]) -> list[fx.Node]:
    """The outputs that a program differentiates: the reduced ones if there are any."""
    found = [
        (n, o.combine.is_reduction)
        for n, o in zip(results_of(captured.graph_module.graph), captured.outputs, strict=True)
        if not o.internal and any(needs[n])
    ]
    return [n for n, reduced in found if reduced] or [n for n, _ in found]


def _metadata(node: fx.Node) -> Hashable:
    """Describe a node's tensors by size, stride and dtype; a number by its value."""
    if is_size(node):
        return str(symbolic_size(node.meta["val"]))
    return tuple((str(t.shape), str(t.stride()), t.dtype) for t in tensors_of(node))


def _flags_like(node: fx.Node, flag: bool) -> Flags:
    """`flag` for each tensor of a node's value that can have a gradient, False for the others."""
    return tuple(
        flag and isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
        for x in pytree.tree_leaves(node.meta["val"])
    )


def _storages(node: fx.Node) -> list[int]:
    return [storage_id(t) for t in tensors_of(node)]
