"""Rewrite single ops while a graph is normalized: inactive dropouts, squeezes, `random_`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopipe.errors import UnsupportedError
from autopipe.passes.graph import source_line, symbolic_size

aten = torch.ops.aten

RANDOM_BETWEEN = getattr(aten.random_, "from")
"""``random_(low, high)``. Code cannot name this overload: `from` is a keyword of Python."""

SQUEEZES: dict[Any, Any] = {
    getattr(packet, overload): packet.dims
    for packet in (aten.squeeze, aten.squeeze_, aten.squeeze_copy)
    for overload in ("default", "dim", "dims")
}
"""Every squeeze → its overload that takes a list of dimensions."""

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


def name_squeezed_dims(node: fx.Node) -> None:
    """Rewrite a squeeze to list the dimensions that have size 1 in the captured batch.

    A micro-batch of one sample then keeps its batch dimension. The model itself would squeeze a
    whole batch of one sample; the node is marked "squeezed" for `size_guards`.

    Args:
        node: one of the `SQUEEZES`; changed in place.
    """
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    asked: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    dims = [d % len(shape) for d in ([asked] if isinstance(asked, int) else asked)] if shape else []
    sizes = {d: symbolic_size(shape[d]) for d in dims}
    if any(s.free_symbols for s in sizes.values()):
        node.meta["squeezed"] = True
    node.target = SQUEEZES[node.target]
    node.args = (source, [d for d, s in sizes.items() if s == 1])


def is_inactive_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout that drops nothing: eager torch returns its argument itself."""
    if node.target not in DROPOUTS:
        return False
    probability, train = node.args[1:3]
    return train is False or (isinstance(probability, (int, float)) and probability == 0)


def shift_random(node: fx.Node) -> fx.Node:
    """Rewrite ``random_(low, high)`` as ``random_(high - low)``, then ``add_(low)``.

    Args:
        node: changed in place.

    Returns:
        The op whose result is that of the rewritten one.

    Raises:
        UnsupportedError: it has no upper limit.
    """
    written, low, high = (*node.args, None, None)[:3]
    if not isinstance(low, int) or not isinstance(high, int):
        raise UnsupportedError(
            "random_ with a lower limit only cannot be pipelined",
            node=node.name,
            source=source_line(node),
            remedy="give it both limits: x.random_(low, high)",
        )
    node.target, node.args = aten.random_.to, (written, high - low)
    with node.graph.inserting_after(node):
        shifted = node.graph.call_function(aten.add_.Scalar, (node, low))
    shifted.meta = dict(node.meta)
    return shifted
