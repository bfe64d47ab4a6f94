"""Which values of a captured graph need a gradient, and which get one.

Forwards: what is computed from a parameter or an input that wants a gradient, as autograd itself
says of each call. Backwards: what a gradient comes for, from the results that a program is
differentiated at. A frozen part of a model gets none, and the first layer owes its input none.

In-place writes are followed by memory: what is read after one depends on it.
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


class GradientAnalysis:
    """What is found out about one graph.

    Attributes:
        of: for each call that is costed, its kind of call.
        flows: the gradients that it takes part in.
        kept: memory (by its identity) that autograd keeps for the backward.
        shares: how many gradients are summed for a value.
    """

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.nodes = list(captured.graph_module.graph.nodes)
        self.known: dict[Hashable, DistinctCall] = {}
        self.of: dict[fx.Node, DistinctCall] = {}
        self.looks: dict[fx.Node, Hashable] = {}
        self.needs: dict[fx.Node, Flags] = {}
        self.gets: dict[fx.Node, list[bool]] = {}
        self.shares: Counter[fx.Node] = Counter()
        self.kept: set[int] = set()
        self.writer: dict[int, fx.Node] = {}
        self.behind: dict[fx.Node, list[fx.Node]] = {}
        self.flows: dict[fx.Node, GradFlow] = {}

    def run(self) -> None:
        """Both walks."""
        self._forwards()
        for node in _differentiated(self.captured, self.needs):
            self._gets(node, self.needs[node])
        self._backwards()

    # ------------------------------------------------------------------ which need a gradient

    def _forwards(self) -> None:
        wanted = {i.name for i in self.captured.inputs if i.requires_grad}
        for node in self.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                self.needs[node] = (node.name in wanted,)
            elif is_size(node):
                self.needs[node] = (False,)
            elif not isinstance(node.target, OpOverload):
                self.needs[node] = self._needs_of_plain(node)
            else:
                self.needs[node] = self._needs_of_call(node)

    def _needs_of_plain(self, node: fx.Node) -> Flags:
        """Python's own functions: a part of several results; others are taken to pass gradients."""
        if node.target is operator.getitem and isinstance(node.args[1], int):
            source: Any = node.args[0]
            if isinstance(node.meta["val"], Tensor) or node.meta["val"] is None:
                return (self.needs[source][node.args[1]],)
        return _like(node, any(any(self.needs[n]) for n in tensor_operands(node)))

    def _needs_of_call(self, node: fx.Node) -> Flags:
        operands = tensor_operands(node)
        # The last write to what is read; that one reads the ones before.
        writers = {n: [self.writer[s] for s in _storages(n) if s in self.writer] for n in operands}
        self.behind[node] = [w for n, late in writers.items() for w in late if w is not n]
        needs = [
            _like(n, True) if any(any(self.needs[w]) for w in writers[n]) else self.needs[n]
            for n in operands
        ]
        key = self._key(node, tuple(needs))
        if key not in self.known:
            self.known[key] = DistinctCall.of(node, tuple(needs))
        self.of[node] = known = self.known[key]
        flags = (
            _like(node, any(map(any, needs)))
            if known.refused
            else known.run(PROBE_BATCHES[0]).flags
        )
        for n in written_arguments(node):
            self.writer.update(dict.fromkeys(_storages(n), node))
        return flags

    def _key(self, node: fx.Node, needs: tuple[Flags, ...]) -> Hashable:
        position = {n: i for i, n in enumerate(tensor_operands(node))}

        def look(value: Any) -> Hashable:
            if isinstance(value, fx.Node):
                if value not in self.looks:
                    self.looks[value] = _look(value)
                return (position.get(value), self.looks[value])
            if isinstance(value, (tuple, list)):
                return tuple(map(look, value))
            if isinstance(value, dict):
                return tuple((k, look(v)) for k, v in value.items())
            return str(value)

        new = tuple(s in self.owned(node) for s in _storages(node))
        return (node.target, look(node.args), look(node.kwargs), needs, new)

    def owned(self, node: fx.Node) -> set[int]:
        """The memory of a call's operands."""
        return {s for n in tensor_operands(node) for s in _storages(n)}

    # ------------------------------------------------------------------ which get one

    def _gets(self, node: fx.Node, flags: Sequence[bool]) -> None:
        """A gradient comes for (some leaves of) a node."""
        if any(flags):
            before = self.gets.get(node, [False] * len(flags))
            self.gets[node] = [a or b for a, b in zip(before, flags, strict=True)]
            self.shares[node] += 1

    def _backwards(self) -> None:
        for node in reversed(self.nodes):
            if node.op != "call_function":
                continue
            needs = self.needs[node]
            came = self.gets.get(node, [False] * len(needs))
            wanted = tuple(a and b for a, b in zip(came, needs, strict=True))
            if node not in self.of:
                self._pass_on(node, wanted)
                continue
            known = self.of[node]
            self.flows[node] = known.flow(wanted)
            if any(wanted):
                self._back(node, wanted)

    def _pass_on(self, node: fx.Node, wanted: Flags) -> None:
        """A gradient goes through one of Python's functions."""
        if not any(wanted):
            return
        for n in tensor_operands(node):
            part = node.args[1] if node.target is operator.getitem else None
            if isinstance(part, int):
                self._gets(n, [i == part for i in range(len(self.needs[n]))])
            else:
                self._gets(n, self.needs[n])

    def _back(self, node: fx.Node, wanted: Flags) -> None:
        """A call's backward runs: what it hands on, and what was kept for it."""
        operands, flow = tensor_operands(node), self.flows[node]
        for n, arrives in zip(operands, self.of[node].arrives(wanted), strict=True):
            self._gets(n, arrives)
        for writer in self.behind[node]:
            self.gets[writer] = list(self.needs[writer])
        for i in flow.saved_operands:
            self.kept.update(_storages(operands[i]))
        if self.of[node].keeps_results:
            self.kept.update(_storages(node))


def _differentiated(captured: Captured, needs: Mapping[fx.Node, Flags]) -> list[fx.Node]:
    """The results that a program takes gradients from: the reduced ones if there are any."""
    found = [
        (n, o.combine in ("sum", "mean"))
        for n, o in zip(results_of(captured.graph_module.graph), captured.outputs, strict=True)
        if not o.internal and any(needs[n])
    ]
    return [n for n, reduced in found if reduced] or [n for n, _ in found]


def _look(node: fx.Node) -> Hashable:
    """What a node makes: tensors by size, strides and dtype, numbers by their value."""
    if is_size(node):
        return str(symbolic_size(node.meta["val"]))
    return tuple((str(t.shape), str(t.stride()), t.dtype) for t in tensors_of(node))


def _leaves(node: fx.Node) -> list[Any]:
    value = node.meta["val"]
    return list(pytree.tree_leaves(value))


def _like(node: fx.Node, flag: bool) -> Flags:
    """`flag` for each leaf of a node's value that can have a gradient."""
    return tuple(
        flag and isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
        for x in _leaves(node)
    )


def _storages(node: fx.Node) -> list[int]:
    return [storage_id(t) for t in tensors_of(node)]
