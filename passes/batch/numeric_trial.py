"""Run the captured graph on a few samples to decide states that the rules leave open.

Where tokens are sorted by expert and sorted back, or entries are picked by computed indices, only
data can tell whether samples stay independent. `NumericTrial` runs the graph together with
`propagate_states`: once on all samples and, where samples have been mixed, also on two or three
slices of them. As soon as a value equals its joined slices, its samples count as independent again.
The gradients of custom autograd.Functions are tested too. Randomness is disabled where samples are
mixed.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.passes.graph import (
    is_close,
    is_inexact,
    is_random,
    is_size,
    symbolic_size,
    tensors_of,
    written_arguments,
)
from autopipe.passes.ir import InputKind, at_batch

from .backward_trial import TrialRun, backward_keeps_apart
from .lattice import Mixed, Reduced, Samples, batch_dims, batch_multiple
from .slicing import join_parts, slice_samples, take_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autopipe.passes.ir import Input

aten = torch.ops.aten

FEWEST, MOST = 5, 32
"""Least and largest number of samples to run; between them, as many as the example has."""

IDENTITIES = (aten.dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default)


class UnknownValueError(Exception):
    """A value cannot be computed. The class itself is stored in place of such a value."""


FAILURES = (UnknownValueError, RuntimeError, IndexError, ValueError)


class NumericTrial:
    """A trial that compares all samples with slices of them; see the module.

    Args:
        graph: normalized.
        inputs: its placeholders.
        tensor: returns a placeholder's value; for an input of the call, with at least one sample.

    Attributes:
        samples: number of samples that are run.
        cuts: (first sample, number of samples) of each slice.
        whole: node → its value for all samples, until its last use.
        parts: node → its value for each slice, where samples are mixed.
        functions: node of a custom Function → its run on all samples, its runs on each slice, and
            the states of its tensors.
        states: node → its state when it was visited.
        decided: node where samples may have mixed → what the trial found, for a note.
    """

    def __init__(
        self, graph: fx.Graph, inputs: Sequence[Input], tensor: Callable[[Input], Tensor]
    ) -> None:
        self.inputs = {i.name: i for i in inputs}
        self.tensor = tensor
        batches = [tensor(i).shape[i.batch_dim] for i in inputs if i.batch_dim is not None]
        self.samples = min(max([FEWEST, *batches]), MOST)
        a, b = self.samples * 2 // 7, self.samples * 4 // 7
        ends = [0, a, b, self.samples] if self.samples > 6 else [0, 2, self.samples]
        self.cuts = tuple((start, end - start) for start, end in pairwise(ends))
        self.functions: dict[fx.Node, tuple[TrialRun, list[TrialRun], list[Any]]] = {}
        self.whole: dict[fx.Node, Any] = {}
        self.parts: dict[fx.Node, list[Any]] = {}
        self.states: dict[fx.Node, Any] = {}
        self.decided: dict[fx.Node, str] = {}
        order = {n: i for i, n in enumerate(graph.nodes)}
        self.last_uses: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            last = max(node.users, key=order.__getitem__, default=node)
            self.last_uses.setdefault(last, []).append(node)

    def step(self, node: fx.Node, state: Any, states: dict[fx.Node, Any]) -> Any:
        """Decide a node's state; see `NodeTrial`."""
        self.states[node] = state = self._step(node, state, states)
        return state

    def _step(self, node: fx.Node, state: Any, states: Mapping[fx.Node, Any]) -> Any:
        if is_size(node):
            return state
        if node.op == "placeholder":
            self.whole[node] = self._example_value(self.inputs[node.name])
            return state
        by_parts = isinstance(state, (Mixed, Reduced)) or (
            isinstance(state, Samples) and state.index_step is not None
        )
        if by_parts or any(n in self.parts for n in node.all_input_nodes):
            self.parts[node] = self._run_parts(node, states, mixed=isinstance(state, Mixed))
        try:
            self.whole[node] = _run(node, self._whole_value, self.samples)
        except FAILURES:  # for example an index that is out of range for so few samples
            self.whole[node] = UnknownValueError
        if node.target is torch.ops.autopipe.function.default:
            self._run_function(node)
        if isinstance(state, Mixed) and not state.proven:
            state = self._decide(node, state)
        if not isinstance(state, Mixed) and not by_parts:
            self.parts.pop(node, None)
        for gone in self.last_uses.get(node, ()):
            self.whole.pop(gone, None)
            self.parts.pop(gone, None)
        return state

    def _example_value(self, item: Input) -> Tensor:
        value = self.tensor(item).detach()
        if item.batch_dim is None:
            return value.clone() if item.kind is InputKind.BUFFER else value
        return take_samples(value, item.batch_dim, self.samples)

    def _whole_value(self, source: fx.Node) -> Any:
        value = self.whole[source]
        if value is UnknownValueError:
            raise UnknownValueError
        return value

    def _part_value(self, states: Mapping[fx.Node, Any], n: int, source: fx.Node) -> Any:
        """A node's value for the n-th slice."""
        if source not in self.parts:
            if isinstance(states[source], Mixed):  # was written to through another view
                raise UnknownValueError
            return slice_samples(self._whole_value(source), self.states[source], *self.cuts[n])
        value = self.parts[source][n]
        if value is UnknownValueError:
            raise UnknownValueError
        return value

    def _run_parts(self, node: fx.Node, states: Mapping[fx.Node, Any], *, mixed: bool) -> list[Any]:
        for source in written_arguments(node):
            if source not in self.parts:
                whole, state = self.whole[source], self.states[source]
                self.parts[source] = [
                    whole if whole is UnknownValueError else slice_samples(whole, state, *c).clone()
                    for c in self.cuts
                ]
        results = []
        for n, (_, count) in enumerate(self.cuts):
            try:
                results.append(
                    _run(node, partial(self._part_value, states, n), count, no_random=mixed)
                )
            except FAILURES:
                results.append(UnknownValueError)
        return results

    def _run_function(self, node: fx.Node) -> None:
        """Run a custom Function with gradients, so that its backward can be tested per result."""
        sources: list[fx.Node] = node.args[0]  # type: ignore[assignment]
        states = [self.states[s] for s in sources]
        if any(isinstance(s, Mixed) for s in states):
            return  # unknown which gradient belongs to which sample
        try:
            whole = TrialRun(node, [self._whole_value(s) for s in sources])
            parts = [
                TrialRun(node, [self._part_value(self.states, n, s) for s in sources])
                for n in range(len(self.cuts))
            ]
        except FAILURES:
            return
        self.functions[node] = whole, parts, states

    def _backward_mixes(self, node: fx.Node, found: Samples) -> bool:
        """Whether `node` is a result of a Function whose backward mixes samples."""
        call: Any = node.args[0] if node.target is getitem else None
        if call not in self.functions:
            return False
        position: Any = node.args[1]
        whole, parts, states = self.functions[call]
        return not backward_keeps_apart(whole, parts, position, found, states, self.cuts)

    def _decide(self, node: fx.Node, state: Mixed) -> Any:
        whole, parts = self.whole[node], self.parts[node]
        if not isinstance(whole, Tensor) or not is_inexact(whole):
            return state
        if any(p is UnknownValueError for p in parts):
            return state
        if _is_uniform(whole):
            return state
        for found in candidate_states(node):
            try:
                again = join_parts(parts, found)
            except RuntimeError:
                continue
            if is_close(again, whole):
                if self._backward_mixes(node, found):
                    return Mixed(state.node, "the backward of a custom Function mixes samples")
                trial = f"a trial on {self.samples} samples"
                self.decided[state.node] = f"keeps samples apart, as {trial} found"
                return found
        return state


def candidate_states(node: fx.Node) -> list[Samples]:
    """The `Samples` states that fit a result's shape, the most common one first."""
    tensors = tensors_of(node)
    if len(tensors) != 1 or not is_inexact(tensors[0]):
        return []
    shape = tuple(map(symbolic_size, tensors[0].shape))
    dims = batch_dims(shape)
    times = batch_multiple(shape[dims[0]]) if len(dims) == 1 else None
    if times is None:
        return []
    return [Samples(dims[0], 1, times)] + ([Samples(dims[0], times, 1)] if times > 1 else [])


def _run(
    node: fx.Node, value: Callable[[fx.Node], Any], batch: int, *, no_random: bool = False
) -> Any:
    """Run one op; with `no_random`, refuse ops that draw random numbers."""

    def argument(source: fx.Node) -> Any:
        return (
            at_batch(symbolic_size(source.meta["val"]), batch) if is_size(source) else value(source)
        )

    if no_random and node.target in IDENTITIES:
        return argument(node.all_input_nodes[0])
    if no_random and is_random(node):
        raise UnknownValueError
    args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
    cast = node.meta.get("autocast")
    target: Any = node.target
    with torch.autocast(*cast) if cast else nullcontext():
        return target(*args, **kwargs)


def _is_uniform(value: Tensor) -> bool:
    """Whether all entries are equal, so that their order cannot be seen."""
    finite = value[value.isfinite()]
    return finite.numel() == 0 or bool((finite == finite.flatten()[0]).all())
