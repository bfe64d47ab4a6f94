"""Running statistics of the whole batch, computed from those of its micro-batches.

A norm still normalises each micro-batch by its own statistics, as in the GPipe paper (section 2.2).
Its op is changed to write them to separate tensors (momentum 1), from which the new values of its
buffers are computed.

BatchNorm: n is the number of samples times positions of the batch, n_i of one micro-batch; s is the
old running mean, subtracted against cancellation:

    mean = Σ n_i mean_i / n,   variance = Σ n_i (var_i + (mean_i - s)²) / n - (mean - s)²

InstanceNorm: its running statistics are the means over the samples of each sample's mean and
unbiased variance. Those of the batch are the mean of the micro-batches' statistics, weighted by
their numbers of samples.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.passes.graph import add_product, add_size

if TYPE_CHECKING:
    from collections.abc import Callable

    Add = Callable[..., fx.Node]

aten = torch.ops.aten

CUMULATIVE_MOMENTUM = -1.0
"""Replaces momentum None while a model is captured. It means 1 / (number of batches so far)."""

NORMS = {aten.batch_norm.default, aten.instance_norm.default}
"""Ops whose running statistics can be computed from those of micro-batches."""


def momentum_of(node: fx.Node) -> float | None:
    """The momentum of a norm's node; None if it is not a number."""
    momentum = node.args[6] if len(node.args) > 6 else None
    return float(momentum) if isinstance(momentum, (int, float)) else None


def separate_statistics(
    graph: fx.Graph, node: fx.Node, add: Add, counter: fx.Node | None, shift: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Let a norm write its statistics to separate tensors; compute its new running statistics.

    Args:
        graph: nodes are added after `node`; the tensors that it writes to, before it.
        node: one of the `NORMS` that reads and writes running statistics.
        add: adds an op to the graph.
        counter: the number of batches that a BatchNorm has seen, for cumulative averages.
        shift: the running mean before the step.

    Returns:
        The new running mean and variance, and the node that is combined over micro-batches by
        "mean".
    """
    x, mean, variance = node.args[0], node.args[3], node.args[4]
    momentum: Any = momentum_of(node)
    with graph.inserting_before(node):
        own = [add(aten.zeros_like.default, b) for b in (mean, variance)]
    node.args = (*node.args[:3], *own, True, 1.0, *node.args[7:])
    if node.target is aten.instance_norm.default:
        packed = add(aten.stack.default, own)
        whole, spread = (add(aten.select.int, packed, 0, n) for n in (0, 1))
    else:
        packed, whole, spread = _moments(graph, x, shift, own, add)
    blend: Any = aten.lerp.Scalar
    if momentum == CUMULATIVE_MOMENTUM and counter is not None:
        blend = aten.lerp.Tensor
        batches = add(aten.to.dtype, counter, own[0].meta["val"].dtype)
        momentum = add(aten.reciprocal.default, batches)
    return add(blend, mean, whole, momentum), add(blend, variance, spread, momentum), packed


def _moments(
    graph: fx.Graph, x: Any, old: Any, own: list[fx.Node], add: Add
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The moments that are combined over micro-batches; the batch's mean and variance from them."""
    positions = add_product(graph, x, range(2, x.meta["val"].dim()))
    samples = add_size(graph, aten.sym_size.int, x, 0)
    count = add_size(graph, operator.mul, samples, positions)
    moved = add(aten.square.default, add(aten.sub.Tensor, own[0], old))
    biased = add(aten.sub.Tensor, own[1], add(aten.div.Tensor, own[1], count))
    packed = add(aten.stack.default, [own[0], moved, biased])
    whole = add(aten.select.int, packed, 0, 0)
    shift = add(aten.square.default, add(aten.sub.Tensor, whole, old))
    spread = add(aten.sum.dim_IntList, add(aten.slice.Tensor, packed, 0, 1, 3), [0])
    scaled = add(aten.mul.Tensor, add(aten.sub.Tensor, spread, shift), count)
    unbiased = add(aten.div.Tensor, scaled, add_size(graph, operator.sub, count, 1))
    return packed, whole, unbiased
