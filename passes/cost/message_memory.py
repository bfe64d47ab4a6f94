"""Find messages between stages that are parts of one tensor's memory.

Between devices a value is copied, and each copy is a tensor of its own. On one device it is passed
as it is. So a stage that receives the three parts of a projection (``qkv.chunk(3)``) holds the
memory of the whole projection, once, and also if it receives only one of the three.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from autopipe.passes._torch import storage_id
from autopipe.passes.ir import CALLER

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import fx

    from autopipe.passes.ir import Phased, StagePhases


class MessageMemory(NamedTuple):
    """The memory that a message is a part of.

    Attributes:
        group: equal for the messages to a stage that share it.
        nbytes: of all of it.
    """

    group: int
    nbytes: int


def shared_messages(
    phased: Phased, devices: Sequence[torch.device], k: int
) -> tuple[MessageMemory | None, ...]:
    """Return the memory of each message that a stage receives, values before gradients.

    Args:
        phased: the traced stages.
        devices: of the stages.
        k: the stage that receives.

    Returns:
        For each value in `receives`, then for each gradient in `tangents`: its memory; None for a
        tensor of its own.
    """
    stage = phased.stages[k]
    sent = [
        *(_value_at_sender(phased, devices, name, k) for name in stage.receives),
        *(_gradient_at_sender(phased, devices, name, k) for name in stage.tangents),
    ]
    groups: dict[tuple[int, int], int] = {}
    found: list[MessageMemory | None] = []
    for one in sent:
        if one is None:
            found.append(None)
            continue
        sender, tensor = one
        group = groups.setdefault((sender, storage_id(tensor)), len(groups))
        found.append(MessageMemory(group, int(tensor.untyped_storage().nbytes())))
    return tuple(found)


def _value_at_sender(
    phased: Phased, devices: Sequence[torch.device], name: str, k: int
) -> tuple[int, Tensor] | None:
    """A value in the stage that computed it, if stage k gets that tensor; None for a copy.

    What is a part of the caller's tensors or of a parameter is not a message's memory.
    """
    route = phased.split.routes[name]
    if route.source == CALLER:
        return None
    way = route.holders[: route.holders.index(k) + 1]
    if any(devices[a] != devices[b] for a, b in pairwise(way)):
        return None
    sender = phased.stages[route.source]
    tensor = _tensor(sender.results()["returns"][sender.returns.index(name)])
    if tensor is None:
        return None
    arguments = _arguments(sender)
    held = arguments[: len(sender.state)]
    if any(storage_id(t) == storage_id(tensor) for t in map(_tensor, held) if t is not None):
        return None
    received = arguments[len(sender.state) :]
    for earlier, node in zip(sender.receives, received, strict=False):
        other = _tensor(node)
        if other is not None and storage_id(other) == storage_id(tensor):
            return _value_at_sender(phased, devices, earlier, sender.index)
    return sender.index, tensor


def _gradient_at_sender(
    phased: Phased, devices: Sequence[torch.device], name: str, k: int
) -> tuple[int, Tensor] | None:
    """A gradient in the stage that sends it to stage k; None for a copy, or the caller's."""
    route = phased.split.routes.get(name)
    later = None if route is None else route.gradient_from(k)
    if later is None or devices[later] != devices[k]:
        return None
    sender = phased.stages[later]
    tensor = _tensor(sender.results()["sent_grads"][sender.sent_grads.index(name)])
    if tensor is None:
        return None
    arrived = {storage_id(t) for t in map(_tensor, _arguments(sender)) if t is not None}
    return None if storage_id(tensor) in arrived else (later, tensor)


def _arguments(stage: StagePhases) -> list[fx.Node]:
    """The placeholders of what a stage has and receives: `state`, `receives`, `tangents`."""
    _, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    return placeholders


def _tensor(node: fx.Node | None) -> Tensor | None:
    value = None if node is None else node.meta.get("val")
    return value if isinstance(value, Tensor) else None
