"""Batch reductions computed in two steps: sums per micro-batch, the rest on the whole batch.

    object        per micro-batch m       for the whole batch
    COUNTED_MEAN  s_m = Σ losses          Σ_m s_m / Σ_m c_m
                  c_m = Σ weights
    ACCUMULATION  s_m = op(0, samples)    base + Σ_m s_m

The ops per micro-batch are added to the captured graph, those for the whole batch to the epilogue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.passes.graph import add_call, functional_variant, written_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten

SUM_REDUCTION = 2
"""ATen's number for ``reduction="sum"``."""


@dataclass(frozen=True)
class PartialReduction(ABC):
    """A reduction over the batch that is rewritten as sums per micro-batch."""

    @abstractmethod
    def partial_sums(self, graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, ...]:
        """Add ops to the captured `graph` that compute a micro-batch's sums for `node`."""

    def base(self, node: fx.Node) -> fx.Node | None:
        """The value that the batch's sums are added to, if there is one."""
        return None

    @abstractmethod
    def finish(
        self, graph: fx.Graph, node: fx.Node, sums: Sequence[fx.Node], base: fx.Node | None
    ) -> fx.Node:
        """Add to the epilogue's `graph` the ops that compute the batch's value of `node`.

        Args:
            graph: of the epilogue.
            node: the reduction, in the captured graph.
            sums: the batch's sums, in the epilogue.
            base: the epilogue's node for `base(node)`.
        """


@dataclass(frozen=True)
class CountedMean(PartialReduction):
    """The mean of a cross entropy over the targets that are not ``ignore_index``.

    With class weights w and targets t it is Σ w[t_i] loss_i / Σ w[t_i]. A micro-batch without such
    targets adds 0 to both sums.
    """

    def partial_sums(self, graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, ...]:
        """The sum of the losses, and the sum of the weights of the counted targets."""
        target: Any = node.target
        names = [a.name for a in target._schema.arguments]
        arguments = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        weight, labels = arguments.get("weight"), arguments["target"]
        with graph.inserting_before(node.next):  # its arguments may be written to later
            total = add_call(graph, target, **arguments | {"reduction": SUM_REDUCTION})
            ignored = arguments.get("ignore_index", -100)
            counted = add_call(graph, aten.ne.Scalar, labels, ignored)
            if weight is not None:
                index = add_call(graph, aten.where.ScalarOther, counted, labels, 0)
                weights = add_call(graph, aten.index.Tensor, weight, [index])
                counted = add_call(graph, aten.mul.Tensor, weights, counted)
            return total, add_call(graph, aten.sum.default, counted)

    def finish(
        self, graph: fx.Graph, node: fx.Node, sums: Sequence[fx.Node], base: fx.Node | None
    ) -> fx.Node:
        return add_call(graph, aten.div.Tensor, *sums)


@dataclass(frozen=True)
class Accumulation(PartialReduction):
    """`scatter_add`, `index_add` or an accumulating `index_put`, in place or not.

    Each sample adds its contribution to a base that does not depend on the batch. A micro-batch's
    sum is the same op on zeros.
    """

    def base(self, node: fx.Node) -> fx.Node:
        """The tensor that the op adds to: its first argument."""
        first: Any = node.args[0]
        assert isinstance(first, fx.Node)
        return first

    def partial_sums(self, graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, ...]:
        """The same op on zeros, out of place."""
        with graph.inserting_before(node):
            zeros = add_call(graph, aten.zeros_like.default, self.base(node))
            op = functional_variant(node.target)
            return (add_call(graph, op, zeros, *node.args[1:], **node.kwargs),)

    def finish(
        self, graph: fx.Graph, node: fx.Node, sums: Sequence[fx.Node], base: fx.Node | None
    ) -> fx.Node:
        add = aten.add_.Tensor if written_arguments(node) else aten.add.Tensor
        return add_call(graph, add, base, *sums)


COUNTED_MEAN, ACCUMULATION = CountedMean(), Accumulation()
