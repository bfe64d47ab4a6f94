"""The sizes for which a captured graph is valid: batch sizes and lengths.

A model may branch on the number of samples, or turn it into a plain number (``1 / len(x)``). Its
graph then contains the branch for the batch that it was captured with. As in eager torch, this size
is that of the whole batch, not of a micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx

from autopipe.passes.graph import full_size, in_named_sizes
from autopipe.passes.ir import B, SizeGuards, holds_at

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autopipe.passes.ir import Sizes


def collect_guards(
    graph: fx.Graph, conditions: Iterable[tuple[Any, bool]], traced: Sizes
) -> SizeGuards:
    """Collect the conditions on the batch size under which a graph was captured.

    Args:
        graph: normalized; its placeholders' symbols have export's assumptions about them.
        conditions: (condition on sizes, its value) for those that the model itself evaluated.
        traced: the sizes that it was traced with.

    Returns:
        The conditions that were true, and whether one sample satisfies them.
    """
    assumed: dict[sympy.Basic, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            sizes: list[Any] = [s for s in value.shape if isinstance(s, torch.SymInt)]
            for environment in {s.node.shape_env for s in sizes}:
                assumed |= {in_named_sizes(g.expr, environment): None for g in environment.guards}
    squeezed = any("squeezed" in n.meta for n in graph.nodes)
    one = {**traced, B: 1}
    single = all(holds_at(full_size(c), one) == value for c, value in conditions)
    # (If an example's strides are not those that its sizes imply, not every symbol is the batch
    # size. So a condition that is false for the example itself is ignored.)
    guards = (c for c in assumed if c.free_symbols and holds_at(c, traced))
    several = (s >= 2 for s in traced if s != B)  # torch takes no symbol for 0 or 1
    return SizeGuards((*guards, *several), single and not squeezed)
