"""Batch norm in training needs more than one value per channel: how many samples give that."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING

import torch

from autopipe.errors import InputError
from autopipe.passes.graph import full_size, source_line
from autopipe.passes.ir import B

from .metadata import number_at

if TYPE_CHECKING:
    from torch import fx

    from autopipe.passes.ir import Captured, Sizes

aten = torch.ops.aten


def batch_norms(captured: Captured) -> list[fx.Node]:
    """The batch norms that normalise by the statistics of what they receive.

    Args:
        captured: the captured graph.
    """
    nodes = captured.graph_module.graph.nodes
    return [n for n in nodes if n.target is aten.batch_norm.default and n.args[5]]


def least_samples(captured: Captured, batch: int) -> int:
    """The smallest micro-batch in which every batch norm has more than one value per channel.

    Args:
        captured: the captured graph.
        batch: samples in the whole batch.

    Returns:
        From 1 to `batch`; `batch` if no smaller one will do (the whole may not do either).
    """
    norms = batch_norms(captured)
    lengths = {length.name: length.example for length in captured.lengths}

    def is_enough(size: int) -> bool:
        return not any(_has_one_value(n, {B: size, **lengths}) for n in norms)

    return bisect_left(range(1, batch), True, key=is_enough) + 1


def check_batch_norms(captured: Captured, sizes: Sizes) -> None:
    """Refuse a micro-batch that gives a batch norm a single value per channel, as eager does.

    Args:
        captured: the captured graph.
        sizes: of the micro-batch.

    Raises:
        InputError: there is such a batch norm.
    """
    for node in batch_norms(captured):
        if _has_one_value(node, sizes):
            raise InputError(
                f"batch norm in training needs more than one value per channel, and a batch of"
                f" {sizes[B]} has one",
                node=node.name,
                source=source_line(node),
                remedy="use a larger batch; DataLoader(drop_last=True) leaves out a last batch of"
                " one sample",
            )


def _has_one_value(node: fx.Node, sizes: Sizes) -> bool:
    shape = [number_at(full_size(n), sizes) for n in node.meta["val"].shape]
    return math.prod(shape) == shape[1]
