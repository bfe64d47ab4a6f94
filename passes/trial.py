"""What the graph cannot decide, tried: a small batch as a whole against its parts.

Where tokens are sorted by expert and put back later, or entries are picked by indices that were
computed, only data can tell whether samples stay apart. `Parts` runs the captured graph beside
`follow`, once on all samples, and, where a value's samples have been mixed, also on two
parts of them. As soon as a value is again what its parts are when put together, it counts as
kept apart. Random calls draw nothing in mixed regions.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .follow import follow
from .graphs import is_size, size, source_line, tensors_of, written_arguments
from .rounding import close
from .samples import Mixed, Reduced, Samples, batch_dims, factor
from .spec import Kind, at_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .spec import Input

aten = torch.ops.aten

SAMPLES = 5
CUTS = ((0, 2), (2, 3))
"""(first sample, number of samples) of each part."""

IDENTITIES = (aten.dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default)


class UnknownError(Exception):
    """A value of a part cannot be worked out; stands for that value, too."""


class Trust:
    """For models without weights: what cannot be tried is believed to keep samples apart."""

    def __init__(self) -> None:
        self.decided: dict[fx.Node, str] = {}

    def step(self, node: fx.Node, state: Any, states: dict[fx.Node, Any]) -> Any:
        """See `follow.Trial`."""
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
        """See `follow.Trial`."""
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
        self.whole[node] = _run(node, self.whole.__getitem__, SAMPLES)
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
            return value.clone() if item.kind is Kind.BUFFER else value
        return enough(value, item.batch_dim)

    def _run_parts(self, node: fx.Node, states: Mapping[fx.Node, Any], *, mixed: bool) -> list[Any]:
        results = []
        for source in written_arguments(node):
            if source not in self.parts:
                whole, state = self.whole[source], self.found[source]
                self.parts[source] = [_cut(whole, state, *cut).clone() for cut in CUTS]
        for n, (start, count) in enumerate(CUTS):

            def part(source: fx.Node, n: int = n, start: int = start, count: int = count) -> Any:
                if source not in self.parts:
                    if isinstance(states[source], Mixed):  # by a write through another name
                        raise UnknownError
                    return _cut(self.whole[source], self.found[source], start, count)
                value = self.parts[source][n]
                if value is UnknownError:
                    raise UnknownError
                return value

            try:
                results.append(_run(node, part, count, still=mixed))
            except (UnknownError, RuntimeError, IndexError):
                results.append(UnknownError)
        return results

    def _decide(self, node: fx.Node, state: Mixed) -> Any:
        whole, parts = self.whole[node], self.parts[node]
        if not isinstance(whole, Tensor) or UnknownError in parts or not whole.is_floating_point():
            return state
        if _shows_nothing(whole):
            return state
        for found in _arrangements(node):
            try:
                again = _put_together(parts, found)
            except RuntimeError:
                continue
            if close(again, whole):
                self.decided[state.node] = "keeps samples apart, as a trial on 5 samples found"
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
    if len(tensors) != 1 or not tensors[0].is_floating_point():
        return []
    shape = tuple(map(size, tensors[0].shape))
    dims = batch_dims(shape)
    times = factor(shape[dims[0]]) if len(dims) == 1 else None
    if times is None:
        return []
    return [Samples(dims[0], 1, times)] + ([Samples(dims[0], times, 1)] if times > 1 else [])


def enough(value: Tensor, dim: int) -> Tensor:
    """Five samples made of those there are; repeated ones are turned, so that all differ."""
    samples = []
    for n in range(SAMPLES):
        sample = value.narrow(dim, n % value.shape[dim], 1)
        turns = n // value.shape[dim]
        others = [d for d in range(value.dim()) if d != dim and value.shape[d] > 1]
        samples.append(sample.roll(turns, others[-1]) if turns and others else sample)
    return torch.cat(samples, dim)


def _run(node: fx.Node, value: Callable[[fx.Node], Any], batch: int, *, still: bool = False) -> Any:
    """One call; `still`: without drawing random numbers."""

    def argument(source: fx.Node) -> Any:
        return at_batch(size(source.meta["val"]), batch) if is_size(source) else value(source)

    if still and node.target in IDENTITIES:
        return argument(node.all_input_nodes[0])
    if still and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise UnknownError
    args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
    cast = node.meta.get("autocast")
    target: Any = node.target
    with torch.autocast(*cast) if cast else nullcontext():
        return target(*args, **kwargs)


def _cut(value: Any, state: Any, start: int, count: int) -> Any:
    """The part of a value that belongs to some of the samples."""
    if isinstance(value, (tuple, list)):
        each = state if isinstance(state, tuple) else (state,) * len(value)
        return type(value)(_cut(v, s, start, count) for v, s in zip(value, each, strict=True))
    if isinstance(state, Samples):
        dim = state.dim
        return _blocks(value, state).narrow(dim + 1, start, count).flatten(dim, dim + 2)
    return value


def _blocks(value: Tensor, state: Samples) -> Tensor:
    """The dimension of the samples unfolded to (outer, samples, inner)."""
    dim, shape = state.dim, value.shape
    return value.reshape(*shape[:dim], state.outer, -1, state.inner, *shape[dim + 1 :])


def _put_together(parts: Sequence[Tensor], state: Samples) -> Tensor:
    dim = state.dim
    blocks = [_blocks(p, state) for p in parts]
    return torch.cat(blocks, dim + 1).flatten(dim, dim + 2)


def _shows_nothing(value: Tensor) -> bool:
    """A constant is the same in any order."""
    finite = value[value.isfinite()]
    return finite.numel() == 0 or bool((finite == finite.flatten()[0]).all())
