"""Run the captured graph on a few samples to decide states that the rules leave open.

Where tokens are sorted by expert and sorted back, or entries are picked by computed indices, only
data can tell whether samples stay independent. `NumericTrial` runs the graph together with
`propagate_states`: on all samples and, where samples have been mixed, also on two or three slices
of them. As soon as a value equals its joined slices, its samples count as independent again.

One batch may be inert: it has no image token, masks that are all ones, or equal samples. So the
graph runs several times: on the batch at hand, and on batches that are drawn (`trial_inputs`), two
of them with comparisons moved into the range of their values (`comparisons`). Samples count as
independent if all runs agree. The gradients of custom autograd.Functions are tested too. Randomness
is disabled where samples are mixed.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from autopipe.passes.graph import is_inexact, is_size, symbolic_size, tensors_of
from autopipe.passes.ir import InputKind

from .comparisons import activate
from .lattice import Mixed, Reduced, Samples, batch_dims, batch_multiple
from .sample_run import SampleRun, is_uniform
from .slicing import take_samples
from .trial_inputs import DrawnInputs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autopipe.passes.ir import Input

FEWEST, MOST = 5, 32
"""Least and largest number of samples to run; between them, as many as the example has."""

MOST_DRAWN = 8
"""The largest number of samples of a drawn batch."""

DRAWN = (
    DrawnInputs(1, permute=True),
    DrawnInputs(2, limit=True),
    DrawnInputs(3, all_inputs=True),
    DrawnInputs(4, limit=True, repeat=True),
)
"""What the runs after the first are given."""

ACTIVE = (1, 3)
"""The runs in which comparisons are moved that are the same everywhere."""

HERE_ONLY = "; samples stay apart in this batch, but not with other values of the inputs"
NOT_TRIED = "; the model does not run with other values of the inputs"


class NumericTrial:
    """A trial that compares all samples with slices of them; see the module.

    Args:
        graph: normalized.
        inputs: its placeholders.
        tensor: returns a placeholder's value; for an input of the call, with at least one sample.

    Attributes:
        samples: number of samples of the batch at hand that are run.
        runs: on the batch at hand, and on drawn batches.
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
        self.states: dict[fx.Node, Any] = {}
        self.decided: dict[fx.Node, str] = {}
        few = min(self.samples, MOST_DRAWN)
        self.runs = [SampleRun(_cuts(self.samples), self.states, drawn=False)]
        self.runs += [SampleRun(_cuts(few), self.states, drawn=True) for _ in DRAWN]
        order = {n: i for i, n in enumerate(graph.nodes)}
        self.last_uses: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            last = max(node.users, key=order.__getitem__, default=node)
            self.last_uses.setdefault(last, []).append(node)

    def step(self, node: fx.Node, state: Any, states: dict[fx.Node, Any]) -> Any:
        """Decide a node's state; see `NodeTrial`."""
        self.states[node] = state = self._step(node, state, states)
        return state

    def _step(self, node: fx.Node, state: Any, states: dict[fx.Node, Any]) -> Any:
        if is_size(node):
            return state
        if node.op == "placeholder":
            self._start(node, self.inputs[node.name])
            return state
        by_parts = isinstance(state, (Mixed, Reduced)) or (
            isinstance(state, Samples) and state.index_step is not None
        )
        for run in self.runs:
            run.step(node, states, by_parts=by_parts)
        activate(node, state, states, self.runs, [self.runs[n] for n in ACTIVE])
        if isinstance(state, Mixed) and not state.proven:
            state = self._decide(node, state)
        for run in self.runs:
            if not isinstance(state, Mixed) and not by_parts:
                run.parts.pop(node, None)
            for gone in self.last_uses.get(node, ()):
                run.forget(gone)
        return state

    def _start(self, node: fx.Node, item: Input) -> None:
        """Give a placeholder its value in each run."""
        given = self.tensor(item).detach()
        first, *others = self.runs
        first.whole[node] = _of_samples(given, item, first.samples)
        for how, run in zip(DRAWN, others, strict=True):
            run.whole[node] = how.value(node, item, _of_samples(given, item, run.samples))

    def _decide(self, node: fx.Node, state: Mixed) -> Any:
        first = self.runs[0].whole[node]
        if not isinstance(first, Tensor) or not is_inexact(first):
            return state
        if not self.runs[0].is_known(node):
            return state
        known = [r for r in self.runs if r.is_known(node) and not is_uniform(r.whole[node])]
        drawn = [r for r in known if r.drawn]
        here = [r for r in known if not r.drawn]
        if not drawn:
            return replace(state, reason=_added(state.reason, NOT_TRIED)) if here else state
        for found in candidate_states(node):
            apart = all(r.agrees(node, found) for r in drawn)
            if apart and all(r.agrees(node, found) for r in here):
                if any(r.backward_mixes(node, found) for r in known):
                    return Mixed(state.node, "the backward of a custom Function mixes samples")
                trial = f"a trial on {self.samples} samples"
                self.decided[state.node] = f"keeps samples apart, as {trial} found"
                return found
            if not apart and any(r.agrees(node, found) for r in here):
                state = replace(state, reason=_added(state.reason, HERE_ONLY))
        return state


def _added(reason: str, remark: str) -> str:
    """A reason with one remark."""
    return reason if remark in reason else reason + remark


def _cuts(samples: int) -> tuple[tuple[int, int], ...]:
    """(first sample, number of samples) of two or three slices."""
    a, b = samples * 2 // 7, samples * 4 // 7
    ends = [0, a, b, samples] if samples > 6 else [0, 2, samples]
    return tuple((start, end - start) for start, end in pairwise(ends))


def _of_samples(given: Tensor, item: Input, samples: int) -> Tensor:
    if item.batch_dim is None:
        return given.clone() if item.kind is InputKind.BUFFER else given
    return take_samples(given, item.batch_dim, samples)


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
