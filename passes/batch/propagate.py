"""Captured graph → for each of its nodes where the samples of the batch are (`samples`).

One walk in program order. Calls that write in place change the state of everything that shares
the memory. What no rule knows, or what depends on indices that only data can tell, is left
undecided (`Mixed` with certain=False); a `Trial` may then decide by numbers.
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

from . import rules_index, rules_losses, rules_math, rules_shape
from . import rules_join as rules_pieces
from .lattice import (
    COUNT_AS_VALUE,
    REDUCED,
    SIZE,
    STATIC,
    Mixed,
    OpCall,
    Reduced,
    Samples,
    State,
    batch_dims,
    fits,
    fresh,
    join,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.passes.ir import Input

RULES = (
    rules_shape.RULES
    | rules_pieces.RULES
    | rules_index.RULES
    | rules_math.RULES
    | rules_losses.RULES
)
SHAPE_ONLY = (rules_index.new, rules_index.like)
TAKES_SIZES = (
    rules_shape.TAKES_SIZES
    | rules_pieces.TAKES_SIZES
    | rules_index.TAKES_SIZES
    | rules_math.TAKES_SIZES
)


class Trial(Protocol):
    """Runs the graph beside the walk, on the whole of a small batch and on its parts."""

    def step(self, node: fx.Node, state: Any, states: dict[fx.Node, Any]) -> Any:
        """Run one node; returns its state, decided if it was undecided and can be."""


def follow(
    graph: fx.Graph, inputs: Sequence[Input], trial: Trial | None = None
) -> dict[fx.Node, Any]:
    """State of every node, a tuple of states for a node with several results."""
    walk = _Walk(graph, inputs, trial)
    return walk.states


class _Walk:
    def __init__(self, graph: fx.Graph, inputs: Sequence[Input], trial: Trial | None) -> None:
        dims = {i.name: i.batch_dim for i in inputs}
        self.states: dict[fx.Node, Any] = {}
        self.owner = memory_owners(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                dim = dims.get(node.name)
                self.states[node] = STATIC if dim is None else Samples(dim)
            elif node.op == "call_function":
                self.states[node] = self.visit(node)
            else:
                continue
            if trial is not None:
                self.states[node] = trial.step(node, self.states[node], self.states)

    def visit(self, node: fx.Node) -> Any:
        if is_size(node):
            return SIZE
        if node.target is operator.getitem:
            source: Any = node.args[0]
            position: Any = node.args[1]
            found = self.states[source]
            return found[position] if isinstance(found, tuple) else found
        call = OpCall(node, self.states)
        state = checked(call, state_of(call))
        hidden = node.target in HIDDEN_WRITES
        written = REDUCED if hidden or isinstance(state, Reduced) else state
        for target in written_arguments(node):
            self.write(target, written, call)
        return state

    def write(self, target: fx.Node, new: Any, call: OpCall) -> None:
        """What `target` is a view of now holds values in the state `new` too."""
        old, owner = self.states[target], self.owner[target]
        if isinstance(self.states[owner], Mixed):
            return
        if isinstance(old, Mixed):
            new = old
        elif isinstance(self.states[owner], Samples) and not isinstance(old, Samples):
            new = call.mixed("a part of the batch is written by place")
        elif new in (old, STATIC) or isinstance(new, tuple):
            return
        if isinstance(new, Samples) and isinstance(old, Samples) and old.constant:
            self.vary(owner)
            if new == self.states[target]:
                return
        if isinstance(new, Samples):
            new = call.undecided("it writes to a value whose samples are arranged differently")
        for node, state in self.states.items():
            if self.owner[node] is owner and not isinstance(state, tuple):
                if isinstance(state, Reduced) and isinstance(new, Reduced):
                    continue  # its own rule holds for what was reduced before the write
                shapes = [tuple(map(symbolic_size, t.shape)) for t in tensors_of(node)]
                ok = isinstance(new, Mixed) or not any(batch_dims(s) for s in shapes)
                self.states[node] = new if ok else call.mixed("a reduction is written to samples")

    def vary(self, owner: fx.Node) -> None:
        """What shares this memory is no longer the same for all samples."""
        for node, state in self.states.items():
            if self.owner[node] is owner and isinstance(state, Samples):
                self.states[node] = replace(state, constant=False)


def state_of(call: OpCall) -> Any:
    """The rule's answer for one call, or what holds for every call."""
    packet = getattr(call.node.target, "overloadpacket", None)
    rule = RULES.get(packet)
    if rule is None or (rule is rules_math.reduction and "other" in call):
        tags = getattr(call.node.target, "tags", ())
        rule = rules_math.pointwise if torch.Tag.pointwise in tags or rule else None
    if rule in SHAPE_ONLY:
        return rule(call)
    states = [s for n in call.tensors for s in _each(call.states[n])]
    mixed = [s for s in states if isinstance(s, Mixed)]
    reduced = any(isinstance(s, Reduced) for s in states)
    if mixed:
        first = next((s for s in mixed if s.certain), mixed[0])
        if reduced and not first.certain and not is_integer(call.node):
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
        return join(call, [REDUCED, fresh(call, call.out)])
    if rule is not None and call.uses_batch_size and rule not in TAKES_SIZES:
        return call.mixed(COUNT_AS_VALUE) if batched or new_dims else REDUCED
    if rule is not None:
        return rule(call)
    if not new_dims:
        return REDUCED
    return call.undecided("autopipe does not know how this operator treats the batch")


def checked(call: OpCall, state: Any) -> Any:
    """A state that does not fit the shape it is for is no knowledge."""
    outs = tensors_of(call.node)
    states = state if isinstance(state, tuple) else (state,) * len(outs)
    shapes = [tuple(map(symbolic_size, t.shape)) for t in outs]
    if all(fits(s, shape) for s, shape in zip(states, shapes, strict=False)):
        return state
    return call.undecided("it changes the batch in a way that autopipe cannot follow")


def _each(state: Any) -> tuple[State, ...]:
    return state if isinstance(state, tuple) else (state,)
