"""The batch sizes that a captured graph holds for: the branches that were taken on the size.

A model may branch on the number of samples, or make a plain number of it (`scale=1 / len`). Its
graph then holds the branch of the batch that it was captured with. What is asked here is about the
whole batch, as in eager torch, whatever its micro-batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx

from autopipe.passes.graph import in_batch_symbol
from autopipe.passes.ir import SizeGuards, holds_at

if TYPE_CHECKING:
    from collections.abc import Iterable


def branches(graph: fx.Graph, decisions: Iterable[tuple[Any, bool]], batch: int) -> SizeGuards:
    """Branches of a normalized graph.

    Args:
        graph: its placeholders know what was assumed of their sizes.
        decisions: conditions on sizes that the model itself evaluated, and what they gave.
        batch: the number of samples that it was traced with.
    """
    conditions: dict[sympy.Basic, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            sizes: list[Any] = [s for s in value.shape if isinstance(s, torch.SymInt)]
            environments = {s.node.shape_env for s in sizes}
            for environment in environments:
                conditions |= {in_batch_symbol(g.expr): None for g in environment.guards}
    squeezed = any("squeezed" in n.meta for n in graph.nodes)
    one = all(holds_at(in_batch_symbol(c), 1) == taken for c, taken in decisions)
    # (Where strides of the example were assumed to differ from what its sizes give, the symbols
    # stand for more than the batch's size; what is not even true of the example says nothing.)
    taken_ones = (c for c in conditions if c.free_symbols and holds_at(c, batch))
    return SizeGuards(tuple(taken_ones), one and not squeezed)
