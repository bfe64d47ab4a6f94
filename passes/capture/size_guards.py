"""The batch sizes for which a captured graph is valid.

A model may branch on the number of samples, or turn it into a plain number (``1 / len(x)``). Its
graph then contains the branch for the batch that it was captured with. As in eager torch, this size
is that of the whole batch, not of a micro-batch.
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


def collect_guards(
    graph: fx.Graph, conditions: Iterable[tuple[Any, bool]], batch: int
) -> SizeGuards:
    """Collect the conditions on the batch size under which a graph was captured.

    Args:
        graph: normalized; its placeholders' symbols have export's assumptions about them.
        conditions: (condition on sizes, its value) for those that the model itself evaluated.
        batch: the number of samples that it was traced with.

    Returns:
        The conditions that were true, in `B`, and whether one sample satisfies them.
    """
    assumed: dict[sympy.Basic, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            sizes: list[Any] = [s for s in value.shape if isinstance(s, torch.SymInt)]
            for environment in {s.node.shape_env for s in sizes}:
                assumed |= {in_batch_symbol(g.expr): None for g in environment.guards}
    squeezed = any("squeezed" in n.meta for n in graph.nodes)
    single = all(holds_at(in_batch_symbol(c), 1) == value for c, value in conditions)
    # (If an example's strides are not those that its sizes imply, not every symbol is the batch
    # size. So a condition that is false for the example itself is ignored.)
    guards = (c for c in assumed if c.free_symbols and holds_at(c, batch))
    return SizeGuards(tuple(guards), single and not squeezed)
