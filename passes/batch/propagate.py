"""Find the state of every node of a captured graph: which dimension holds the samples.

One pass in program order, with one rule per operator (`RULES`). An op that writes in place changes
the state of every value that shares the memory. Where no rule applies, or where the answer depends
on the data (indices), the state is `Mixed` with proven=False; a `NodeTrial` may then decide it by
running the graph on data.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from autopipe.passes.graph import (
    HIDDEN_WRITES,
    is_integer,
    is_size,
    memory_owners,
    symbolic_size,
    tensors_of,
    written_arguments,
)

from . import (
    rules_index,
    rules_join,
    rules_layers,
    rules_losses,
    rules_math,
    rules_new,
    rules_shape,
)
from .lattice import (
    COUNT_AS_VALUE,
    REDUCED,
    SIZE,
    STATIC,
    Mixed,
    Reduced,
    Samples,
    State,
    batch_dims,
    fits_shape,
)
from .op_call import OpCall, join_states, new_tensor_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.passes.ir import Input

RULES = (
    rules_shape.RULES
    | rules_join.RULES
    | rules_new.RULES
    | rules_index.RULES
    | rules_math.RULES
    | rules_layers.RULES
    | rules_losses.RULES
)
SHAPE_ONLY = (rules_new.new_tensor, rules_new.new_like)
"""Rules for ops that create tensors: the values of their operands do not matter."""

USES_BATCH_SIZE = (
    rules_shape.USES_BATCH_SIZE
    | rules_join.USES_BATCH_SIZE
    | rules_new.USES_BATCH_SIZE
    | rules_layers.USES_BATCH_SIZE
)


class NodeTrial(Protocol):
    """Runs the graph node by node, on a small batch and on slices of it, to decide open states."""

    def step(self, node: fx.Node, state: Any, states: dict[fx.Node, Any]) -> Any:
        """Run one node.

        Args:
            node: the next one in program order.
            state: its state by the rules.
            states: of the nodes before it.

        Returns:
            Its state: the given one, unless that was undecided and the trial decides it.
        """


def propagate_states(
    graph: fx.Graph, inputs: Sequence[Input], trial: NodeTrial | None = None
) -> dict[fx.Node, Any]:
    """Find the state of every node.

    Args:
        graph: normalized.
        inputs: its placeholders, with their batch dimensions.
        trial: decides states that the rules cannot.

    Returns:
        A state for each node; a tuple of states for a node with several results.
    """
    return _StatePropagation(graph, inputs, trial).states


class _StatePropagation:
    """One pass over a graph.

    Attributes:
        states: of the nodes visited so far.
        owner: node → the node that owns its memory (itself, unless it is a view).
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[Input], trial: NodeTrial | None) -> None:
        dims = {i.name: i.batch_dim for i in inputs}
        self.states: dict[fx.Node, Any] = {}
        self.owner = memory_owners(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                dim = dims.get(node.name)
                self.states[node] = STATIC if dim is None else Samples(dim)
            elif node.op == "call_function":
                self.states[node] = self._visit(node)
            else:
                continue
            if trial is not None:
                self.states[node] = trial.step(node, self.states[node], self.states)

    def _visit(self, node: fx.Node) -> Any:
        if is_size(node):
            return SIZE
        if node.target is operator.getitem:
            source: Any = node.args[0]
            position: Any = node.args[1]
            found = self.states[source]
            return found[position] if isinstance(found, tuple) else found
        call = OpCall(node, self.states)
        state = _checked(call, _state_of(call))
        hidden = node.target in HIDDEN_WRITES
        written = REDUCED if hidden or isinstance(state, Reduced) else state
        for target in written_arguments(node):
            self._write(target, written, call)
        return state

    def _write(self, target: fx.Node, new: Any, call: OpCall) -> None:
        """Update the states of all nodes in `target`'s memory, after `new` was written there."""
        old, owner = self.states[target], self.owner[target]
        if isinstance(self.states[owner], Mixed):
            return
        if isinstance(old, Mixed):
            new = old
        elif isinstance(self.states[owner], Samples) and not isinstance(old, Samples):
            new = call.mixed("a part of the batch is written by position")
        elif new in (old, STATIC) or isinstance(new, tuple):
            return
        if isinstance(new, Samples) and isinstance(old, Samples) and old.uniform:
            self._mark_varied(owner)
            if new == self.states[target]:
                return
        if isinstance(new, Samples):
            new = call.undecided("it writes to a value whose samples are arranged differently")
        for node, state in self.states.items():
            if self.owner[node] is owner and not isinstance(state, tuple):
                if isinstance(state, Reduced) and isinstance(new, Reduced):
                    continue  # it was reduced before the write: its own rule holds
                shapes = [tuple(map(symbolic_size, t.shape)) for t in tensors_of(node)]
                ok = isinstance(new, Mixed) or not any(batch_dims(s) for s in shapes)
                self.states[node] = new if ok else call.mixed("a reduction is written to samples")

    def _mark_varied(self, owner: fx.Node) -> None:
        """Record that the values in this memory are no longer the same for all samples."""
        for node, state in self.states.items():
            if self.owner[node] is owner and isinstance(state, Samples):
                self.states[node] = replace(state, uniform=False)


def _state_of(call: OpCall) -> Any:
    """The state of one op's result.

    The first of these that applies decides. A rule for new tensors decides by shape alone. If an
    operand is mixed, so is the result. If neither the operands nor the result's shape have samples,
    the result is reduced if an operand is, else static. Otherwise the operator's rule decides;
    without a rule the state is undecided.
    """
    packet = getattr(call.node.target, "overloadpacket", None)
    rule = RULES.get(packet)
    if rule is None or (rule is rules_math.reduce_dims and "other" in call):
        tags = getattr(call.node.target, "tags", ())
        rule = rules_math.pointwise if torch.Tag.pointwise in tags or rule else None
    if rule in SHAPE_ONLY:
        return rule(call)
    states = [s for n in call.tensors for s in _each(call.states[n])]
    mixed = [s for s in states if isinstance(s, Mixed)]
    reduced = any(isinstance(s, Reduced) for s in states)
    if mixed:
        first = next((s for s in mixed if s.proven), mixed[0])
        if reduced and not first.proven and not is_integer(call.node):
            floats = [
                n for n in call.tensors if isinstance(call.states[n], Reduced) and not is_integer(n)
            ]
            if floats:
                return Mixed(first.node, first.reason)
        return first
    batched = any(isinstance(s, Samples) for s in states)
    new_dims = any(batch_dims(tuple(map(symbolic_size, t.shape))) for t in tensors_of(call.node))
    if not batched and not new_dims and not call.uses_batch_size:
        return REDUCED if reduced else STATIC
    if reduced and not batched and new_dims:
        return join_states(call, [REDUCED, new_tensor_state(call, call.out_shape)])
    if rule is not None and call.uses_batch_size and rule not in USES_BATCH_SIZE:
        return call.mixed(COUNT_AS_VALUE) if batched or new_dims else REDUCED
    if rule is not None:
        return rule(call)
    if not new_dims:
        return REDUCED
    return call.undecided("autopipe does not know how this operator treats the batch")


def _checked(call: OpCall, state: Any) -> Any:
    """`state` if it fits the shape of the op's result; else the rule is wrong: undecided."""
    outs = tensors_of(call.node)
    states = state if isinstance(state, tuple) else (state,) * len(outs)
    shapes = [tuple(map(symbolic_size, t.shape)) for t in outs]
    if all(fits_shape(s, shape) for s, shape in zip(states, shapes, strict=False)):
        return state
    return call.undecided("it changes the batch in a way that autopipe cannot follow")


def _each(state: Any) -> tuple[State, ...]:
    return state if isinstance(state, tuple) else (state,)
