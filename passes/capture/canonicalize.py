"""Calls that are normalized one by one: dropouts that drop nothing, squeezes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopipe.passes.graph import symbolic_size

aten = torch.ops.aten

SQUEEZES: dict[Any, Any] = {
    getattr(packet, overload): packet.dims
    for packet in (aten.squeeze, aten.squeeze_, aten.squeeze_copy)
    for overload in ("default", "dim", "dims")
}

DROPOUTS = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.alpha_dropout.default,
    aten.alpha_dropout_.default,
    aten.feature_dropout.default,
    aten.feature_dropout_.default,
    aten.feature_alpha_dropout.default,
    aten.feature_alpha_dropout_.default,
}


def squeeze_ones(node: fx.Node) -> None:
    """Let a squeeze name the dimensions of one entry that the batch it was captured with has.

    A micro-batch of one sample keeps its dimension. A batch of one would not have: see `branches`.
    """
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    given: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    dims = [d % len(shape) for d in ([given] if isinstance(given, int) else given)] if shape else []
    sizes = {d: symbolic_size(shape[d]) for d in dims}
    if any(s.free_symbols for s in sizes.values()):
        node.meta["squeezed"] = True
    node.target = SQUEEZES[node.target]
    node.args = (source, [d for d, s in sizes.items() if s == 1])


def does_nothing(node: fx.Node) -> bool:
    """A dropout that drops nothing: in eager torch its result is its argument, the same tensor."""
    if node.target not in DROPOUTS:
        return False
    chance, train = node.args[1:3]
    return train is False or (isinstance(chance, (int, float)) and chance == 0)
