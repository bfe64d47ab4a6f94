"""One run of the captured graph: on all samples and, where samples are mixed, on slices of them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.passes.graph import (
    is_close,
    is_random,
    is_size,
    symbolic_size,
    written_arguments,
)
from autopipe.passes.ir import at_batch

from .backward_trial import TrialRun, backward_keeps_apart
from .index_ranges import check_indices
from .lattice import Mixed, Samples
from .slicing import join_parts, slice_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

aten = torch.ops.aten

IDENTITIES = (aten.dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default)


class UnknownValueError(Exception):
    """A value cannot be computed. The class itself is stored in place of such a value."""


FAILURES = (UnknownValueError, RuntimeError, IndexError, ValueError)


class SampleRun:
    """The values of a captured graph for one batch.

    Args:
        cuts: (first sample, number of samples) of each slice.
        states: node → its state when it was visited; shared by the runs of a trial.
        drawn: whether the batch was drawn, so that it may break rules that the model's inputs obey.

    Attributes:
        whole: node → its value for all samples, until its last use.
        parts: node → its value for each slice, where samples are mixed.
        functions: node of a custom Function → its run on all samples, its runs on each slice, and
            the states of its tensors.
    """

    def __init__(
        self,
        cuts: tuple[tuple[int, int], ...],
        states: Mapping[fx.Node, Any],
        *,
        drawn: bool,
    ) -> None:
        self.cuts, self.states, self.drawn = cuts, states, drawn
        self.samples = sum(count for _, count in cuts)
        self.functions: dict[fx.Node, tuple[TrialRun, list[TrialRun], list[Any]]] = {}
        self.whole: dict[fx.Node, Any] = {}
        self.parts: dict[fx.Node, list[Any]] = {}

    def step(self, node: fx.Node, states: Mapping[fx.Node, Any], *, by_parts: bool) -> None:
        """Run one op.

        Args:
            node: the op.
            states: of the nodes before it, as they are now (a later write may have mixed them).
            by_parts: whether slices are run even if no operand has been sliced.
        """
        if by_parts or any(n in self.parts for n in node.all_input_nodes):
            self.parts[node] = self._run_parts(node, states)
        try:
            self.whole[node] = self._run(node, self.whole_value, self.samples)
        except FAILURES:  # for example an index that is out of range for so few samples
            self.whole[node] = UnknownValueError
        if self.drawn and self._exceeds_own_share(node):
            self.whole[node] = UnknownValueError
        if node.target is torch.ops.autopipe.function.default:
            self._run_function(node)

    def forget(self, node: fx.Node) -> None:
        """Drop the values of a node that is not used any more."""
        self.whole.pop(node, None)
        self.parts.pop(node, None)

    def is_known(self, node: fx.Node) -> bool:
        """Whether a node has a value for all samples and for each slice of them."""
        values = [self.whole.get(node, UnknownValueError), *self.parts.get(node, ())]
        return all(v is not UnknownValueError for v in values)

    def agrees(self, node: fx.Node, found: Samples) -> bool:
        """Whether the joined slices of a known value are the value for all samples."""
        try:
            again = join_parts(self.parts[node], found)
        except RuntimeError:
            return False
        return is_close(again, self.whole[node])

    def backward_mixes(self, node: fx.Node, found: Samples) -> bool:
        """Whether `node` is a result of a Function whose backward mixes samples."""
        call: Any = node.args[0] if node.target is getitem else None
        if call not in self.functions:
            return False
        position: Any = node.args[1]
        whole, parts, states = self.functions[call]
        return not backward_keeps_apart(whole, parts, position, found, states, self.cuts)

    def whole_value(self, source: fx.Node) -> Any:
        """A node's value for all samples.

        Raises:
            UnknownValueError: it could not be computed.
        """
        value = self.whole[source]
        if value is UnknownValueError:
            raise UnknownValueError
        return value

    def part_value(self, states: Mapping[fx.Node, Any], n: int, source: fx.Node) -> Any:
        """A node's value for the n-th slice.

        Raises:
            UnknownValueError: it could not be computed.
        """
        if source not in self.parts:
            if isinstance(states[source], Mixed):  # was written to through another view
                raise UnknownValueError
            return slice_samples(self.whole_value(source), self.states[source], *self.cuts[n])
        value = self.parts[source][n]
        if value is UnknownValueError:
            raise UnknownValueError
        return value

    def _run_parts(self, node: fx.Node, states: Mapping[fx.Node, Any]) -> list[Any]:
        for source in written_arguments(node):
            if source not in self.parts:
                whole, state = self.whole[source], self.states[source]
                self.parts[source] = [
                    whole if whole is UnknownValueError else slice_samples(whole, state, *c).clone()
                    for c in self.cuts
                ]
        mixed = isinstance(states.get(node), Mixed)
        results = []
        for n, (_, count) in enumerate(self.cuts):
            value = partial(self.part_value, states, n)
            try:
                results.append(self._run(node, value, count, no_random=mixed))
            except FAILURES:
                results.append(UnknownValueError)
        return results

    def _run(
        self,
        node: fx.Node,
        value: Callable[[fx.Node], Any],
        batch: int,
        *,
        no_random: bool = False,
    ) -> Any:
        """Run one op; with `no_random`, refuse ops that draw random numbers."""

        def argument(source: fx.Node) -> Any:
            return (
                at_batch(symbolic_size(source.meta["val"]), batch)
                if is_size(source)
                else value(source)
            )

        if no_random and node.target in IDENTITIES:
            return argument(node.all_input_nodes[0])
        if no_random and is_random(node):
            raise UnknownValueError
        args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
        if self.drawn:
            check_indices(node.target, args, kwargs)
        cast = node.meta.get("autocast")
        target: Any = node.target
        with torch.autocast(*cast) if cast else nullcontext():
            return target(*args, **kwargs)

    def _exceeds_own_share(self, node: fx.Node) -> bool:
        """Whether a drawn mask takes more, or less, of a batched source than the samples' own.

        Models get as many entries of the source as the mask has; a drawn mask need not. A mask
        without any entry is fine.
        """
        if node.target not in (aten.masked_scatter.default, aten.masked_scatter_.default):
            return False
        into, mask, source = node.args
        assert isinstance(into, fx.Node)
        assert isinstance(mask, fx.Node)
        assert isinstance(source, fx.Node)
        if not isinstance(self.states[source], (Samples, Mixed)):
            return False
        counts = []
        try:
            for n in range(len(self.cuts)):
                value = partial(self.part_value, self.states, n)
                shape = value(into).shape
                counts.append((int(value(mask).expand(shape).sum()), value(source).numel()))
        except FAILURES:
            return True
        return any(taken for taken, _ in counts) and any(taken != own for taken, own in counts)

    def _run_function(self, node: fx.Node) -> None:
        """Run a custom Function with gradients, so that its backward can be tested per result."""
        sources: list[fx.Node] = node.args[0]  # type: ignore[assignment]
        states = [self.states[s] for s in sources]
        if any(isinstance(s, Mixed) for s in states):
            return  # unknown which gradient belongs to which sample
        try:
            whole = TrialRun(node, [self.whole_value(s) for s in sources])
            parts = [
                TrialRun(node, [self.part_value(self.states, n, s) for s in sources])
                for n in range(len(self.cuts))
            ]
        except FAILURES:
            return
        self.functions[node] = whole, parts, states


def is_uniform(value: Tensor) -> bool:
    """Whether all finite entries are equal, so that their order cannot be seen."""
    for some in (value.flatten()[:64], value):  # most values are known to vary after a few entries
        finite = some[some.isfinite()]
        if finite.numel() and bool((finite != finite.flatten()[0]).any()):
            return False
    return True
