"""Check in every step what no rule knows: that samples take their own share of a batched source.

``x.masked_scatter(mask, source)`` hands out the source's entries in order. Samples stay apart if
each takes as many as its own part of the source has, as in a model of text and images that gets an
image per sample. The mask decides, in each batch anew. So each micro-batch counts, and the epilogue
raises an error if a micro-batch took more or fewer than its own. A batch that takes none is fine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.errors import CouplingError

from .lattice import STATIC, Samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

aten = torch.ops.aten


@torch.library.custom_op("autopipe::count_shares", mutates_args=())
def count_shares(into: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Whether masked_scatter takes another number of entries than `source` has, and any at all.

    Returns:
        Two integers, 0 or 1. Of several micro-batches they are added up.
    """
    mask = mask.expand(into.shape)
    repeats = 1
    for dim, stride in enumerate(mask.stride()):  # count an entry that is repeated only once
        if stride == 0 and mask.shape[dim] > 1:
            repeats *= mask.shape[dim]
            mask = mask.narrow(dim, 0, 1)
    taken = mask.count_nonzero() * repeats
    return torch.stack([taken != source.numel(), taken != 0]).long()


@count_shares.register_fake
def _count_shares_meta(into: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return into.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("autopipe::check_shares", mutates_args=())
def check_shares(sums: Tensor, node: str, source: str) -> Tensor:
    """Check the sums of `count_shares` over all micro-batches.

    Args:
        sums: two integers.
        node: name of the op that takes the entries, for the error.
        source: its line in the model; "" if it is not known.

    Raises:
        CouplingError: a micro-batch took more or fewer entries than its own samples have.
    """
    others, some = (bool(n) for n in sums.tolist())
    if others and some:
        raise CouplingError(
            "samples of this batch take entries of a source that belong to other samples, so"
            " micro-batches change the result",
            node=node,
            source=source or None,
            expected="each sample's mask selects as many entries as the sample has in the source",
            found="another number",
            remedy="sort the source by samples and pad it, so that each sample takes its own; or"
            " use chunks=1",
        )
    return sums.clone()


@check_shares.register_fake
def _check_shares_meta(sums: Tensor, node: str, source: str) -> Tensor:
    return torch.empty_like(sums)


def shared_sources(graph: fx.Graph, states: Mapping[fx.Node, Any]) -> Iterator[fx.Node]:
    """The ops of a graph whose samples must each take their own share, and whose results matter."""
    for node in graph.nodes:
        if node.target in (aten.masked_scatter.default, aten.masked_scatter_.default):
            source: Any = node.args[2]
            if isinstance(states.get(node), Samples) and states.get(source, STATIC) != STATIC:
                yield node
