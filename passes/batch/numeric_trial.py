"""What the graph cannot decide, tried: a batch as a whole against its parts.

Where tokens are sorted by expert and put back later, or entries are picked by indices that were
computed, only data can tell whether samples stay apart. `Parts` runs the captured graph beside
`follow`, once on all samples, and, where a value's samples have been mixed, also on two or
three parts of them. As soon as a value is again what its parts are when put together, it counts as
kept apart. Of a custom autograd.Function the gradients are tried too. Random calls draw nothing in
mixed regions.
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
    source_line,
    symbolic_size,
    tensors_of,
    written_arguments,
)
from autopipe.passes.ir import InputKind, at_batch

from .backward_trial import TrialRun, keeps_apart
from .lattice import Mixed, Reduced, Samples, batch_dims, factor
from .propagate import follow
from .slicing import cut, put_together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from autopipe.passes.ir import Input

aten = torch.ops.aten

FEWEST, MOST = 5, 32
"""Samples that are tried: as many as the example has, within these bounds."""

IDENTITIES = (aten.dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default)


class UnknownError(Exception):
    """A value cannot be worked out; stands for that value, too."""


FAILURES = (UnknownError, RuntimeError, IndexError, ValueError)


class Trust:
    """For models without weights: what cannot be tried is believed to keep samples apart."""

    def __init__(self) -> None:
        self.decided: dict[fx.Node, str] = {}

    def step(self, node: fx.Node, state: Any, states: dict[fx.Node, Any]) -> Any:
        """See `propagate.Trial`."""
        if not isinstance(state, Mixed) or state.certain:
            return state
        for found in _arrangements(node):
            self.decided[state.node] = "was not tried, the model has no weights"
            return found
        return state


class Parts:
    """See the module.

    Args:
        graph: normalized.
        inputs: its placeholders.
        tensor: the value of a placeholder; of an input of the call, at least one sample.
    """

    def __init__(
        self, graph: fx.Graph, inputs: Sequence[Input], tensor: Callable[[Input], Tensor]
    ) -> None:
        self.inputs = {i.name: i for i in inputs}
        self.tensor = tensor
        given = [tensor(i).shape[i.batch_dim] for i in inputs if i.batch_dim is not None]
        self.samples = min(max([FEWEST, *given]), MOST)
        a, b = self.samples * 2 // 7, self.samples * 4 // 7
        ends = [0, a, b, self.samples] if self.samples > 6 else [0, 2, self.samples]
        self.cuts = tuple((start, end - start) for start, end in pairwise(ends))
        self.functions: dict[fx.Node, tuple[TrialRun, list[TrialRun], list[Any]]] = {}
        self.whole: dict[fx.Node, Any] = {}
        self.parts: dict[fx.Node, list[Any]] = {}
        self.found: dict[fx.Node, Any] = {}  # states as of each node's own step
        self.decided: dict[fx.Node, str] = {}
        order = {n: i for i, n in enumerate(graph.nodes)}
        self.dying: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            last = max(node.users, key=order.__getitem__, default=node)
            self.dying.setdefault(last, []).append(node)

    def step(self, node: fx.Node, state: Any, states: dict[fx.Node, Any]) -> Any:
        """See `propagate.Trial`."""
        self.found[node] = state = self._step(node, state, states)
        return state

    def _step(self, node: fx.Node, state: Any, states: Mapping[fx.Node, Any]) -> Any:
        if is_size(node):
            return state
        if node.op == "placeholder":
            self.whole[node] = self._given(self.inputs[node.name])
            return state
        apart = isinstance(state, (Mixed, Reduced)) or (
            isinstance(state, Samples) and state.numbered is not None
        )
        if apart or any(n in self.parts for n in node.all_input_nodes):
            self.parts[node] = self._run_parts(node, states, mixed=isinstance(state, Mixed))
        try:
            self.whole[node] = _run(node, self._known, self.samples)
        except FAILURES:  # an index, say, which is good for more samples only
            self.whole[node] = UnknownError
        if node.target is torch.ops.autopipe.function.default:
            self._run_function(node)
        if isinstance(state, Mixed) and not state.certain:
            state = self._decide(node, state)
        if not isinstance(state, Mixed) and not apart:
            self.parts.pop(node, None)
        for gone in self.dying.get(node, ()):
            self.whole.pop(gone, None)
            self.parts.pop(gone, None)
        return state

    def _given(self, item: Input) -> Tensor:
        value = self.tensor(item).detach()
        if item.batch_dim is None:
            return value.clone() if item.kind is InputKind.BUFFER else value
        return enough(value, item.batch_dim, self.samples)

    def _known(self, source: fx.Node) -> Any:
        value = self.whole[source]
        if value is UnknownError:
            raise UnknownError
        return value

    def _part(self, states: Mapping[fx.Node, Any], n: int, source: fx.Node) -> Any:
        """What a value is in the n-th part."""
        if source not in self.parts:
            if isinstance(states[source], Mixed):  # by a write through another name
                raise UnknownError
            return cut(self._known(source), self.found[source], *self.cuts[n])
        value = self.parts[source][n]
        if value is UnknownError:
            raise UnknownError
        return value

    def _run_parts(self, node: fx.Node, states: Mapping[fx.Node, Any], *, mixed: bool) -> list[Any]:
        for source in written_arguments(node):
            if source not in self.parts:
                whole, state = self.whole[source], self.found[source]
                self.parts[source] = [
                    whole if whole is UnknownError else cut(whole, state, *c).clone()
                    for c in self.cuts
                ]
        results = []
        for n, (_, count) in enumerate(self.cuts):
            try:
                results.append(_run(node, partial(self._part, states, n), count, still=mixed))
            except FAILURES:
                results.append(UnknownError)
        return results

    def _run_function(self, node: fx.Node) -> None:
        """Run a custom Function so that its backward can be tried, result by result."""
        sources: list[fx.Node] = node.args[0]  # type: ignore[assignment]
        states = [self.found[s] for s in sources]
        if any(isinstance(s, Mixed) for s in states):
            return  # which gradient belongs to which sample is not known
        try:
            whole = TrialRun(node, [self._known(s) for s in sources])
            parts = [
                TrialRun(node, [self._part(self.found, n, s) for s in sources])
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
        return not keeps_apart(whole, parts, position, found, states, self.cuts)

    def _decide(self, node: fx.Node, state: Mixed) -> Any:
        whole, parts = self.whole[node], self.parts[node]
        if not isinstance(whole, Tensor) or not is_inexact(whole):
            return state
        if any(p is UnknownError for p in parts):
            return state
        if _shows_nothing(whole):
            return state
        for found in _arrangements(node):
            try:
                again = put_together(parts, found)
            except RuntimeError:
                continue
            if is_close(again, whole):
                if self._backward_mixes(node, found):
                    return Mixed(state.node, "the backward of a custom Function mixes samples")
                trial = f"a trial on {self.samples} samples"
                self.decided[state.node] = f"keeps samples apart, as {trial} found"
                return found
        return state


def settle(
    graph: fx.Graph,
    inputs: Sequence[Input],
    states: dict[fx.Node, Any],
    results: Iterable[fx.Node],
    tensor: Callable[[Input], Tensor],
) -> tuple[dict[fx.Node, Any], list[str]]:
    """The states after a trial, if one is needed for what the `results` are, and notes of it."""
    if not any(isinstance(s := states.get(n), Mixed) and not s.certain for n in results):
        return states, []
    given = {i.name: tensor(i) for i in inputs}
    trial: Trust | Parts = Trust()
    if not any(t.is_meta for t in given.values()):
        trial = Parts(graph, inputs, lambda item: given[item.name])
    with torch.no_grad(), torch.random.fork_rng():
        states = follow(graph, inputs, trial)
    return states, [
        f"{n.name} ({source_line(n) or n.target}) {what}" for n, what in trial.decided.items()
    ]


def _arrangements(node: fx.Node) -> list[Samples]:
    """How samples may lie in a result, judging by its shape; the usual one first."""
    tensors = tensors_of(node)
    if len(tensors) != 1 or not is_inexact(tensors[0]):
        return []
    shape = tuple(map(symbolic_size, tensors[0].shape))
    dims = batch_dims(shape)
    times = factor(shape[dims[0]]) if len(dims) == 1 else None
    if times is None:
        return []
    return [Samples(dims[0], 1, times)] + ([Samples(dims[0], times, 1)] if times > 1 else [])


def enough(value: Tensor, dim: int, count: int) -> Tensor:
    """So many samples of those there are; repeated ones are turned, so that all differ."""
    if value.shape[dim] >= count:
        return value.narrow(dim, 0, count)
    samples = []
    for n in range(count):
        sample = value.narrow(dim, n % value.shape[dim], 1)
        turns = n // value.shape[dim]
        others = [d for d in range(value.dim()) if d != dim and value.shape[d] > 1]
        samples.append(sample.roll(turns, others[-1]) if turns and others else sample)
    return torch.cat(samples, dim)


def _run(node: fx.Node, value: Callable[[fx.Node], Any], batch: int, *, still: bool = False) -> Any:
    """One call; `still`: without drawing random numbers."""

    def argument(source: fx.Node) -> Any:
        return (
            at_batch(symbolic_size(source.meta["val"]), batch) if is_size(source) else value(source)
        )

    if still and node.target in IDENTITIES:
        return argument(node.all_input_nodes[0])
    if still and is_random(node):
        raise UnknownError
    args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
    cast = node.meta.get("autocast")
    target: Any = node.target
    with torch.autocast(*cast) if cast else nullcontext():
        return target(*args, **kwargs)


def _shows_nothing(value: Tensor) -> bool:
    """A constant is the same in any order."""
    finite = value[value.isfinite()]
    return finite.numel() == 0 or bool((finite == finite.flatten()[0]).all())
