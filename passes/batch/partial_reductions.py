"""Calls that reduce over the batch → calls on a micro-batch whose results add up to the batch's.

For those reductions that are no sums by themselves (see `lattice.Reduced`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopipe.passes.graph import add_call, functional_variant

aten = torch.ops.aten

SUM = 2  # ATen's number for `reduction`


def counts(graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Cross entropy and its kin, the mean over targets that are not `ignore_index`, by class
    weight: Σ losses and Σ weights. A chunk with nothing to count adds 0 to both sums.
    """
    target: Any = node.target
    names = [a.name for a in target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight = given.get("weight")
    with graph.inserting_before(node.next):  # its arguments may be written to later
        total = add_call(graph, target, **given | {"reduction": SUM})
        kept = add_call(graph, aten.ne.Scalar, given["target"], given.get("ignore_index", -100))
        if weight is not None:
            index = add_call(graph, aten.where.ScalarOther, kept, given["target"], 0)
            weights = add_call(graph, aten.index.Tensor, weight, [index])
            kept = add_call(graph, aten.mul.Tensor, weights, kept)
        return total, add_call(graph, aten.sum.default, kept)


def added_to(node: fx.Node) -> fx.Node:
    """To what `scatter_add`, `index_add` or an accumulating `index_put` adds, in place or not."""
    first: Any = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def addend(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What it adds: the same call on zeros."""
    with graph.inserting_before(node):
        zeros = add_call(graph, aten.zeros_like.default, added_to(node))
        return add_call(
            graph, functional_variant(node.target), zeros, *node.args[1:], **node.kwargs
        )
