"""Find messages that are parts of larger memory.

Between devices a value is copied, and each copy is a tensor of its own. On one device it is passed
as it is. So a stage that receives the three parts of a projection (``qkv.chunk(3)``) holds the
memory of the whole projection, once, and also if it receives only one of the three. A part of
another stage's parameter is memory that is there anyway. A part of the caller's micro-batch counts
as the whole micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from autopipe.passes._torch import storage_id
from autopipe.passes.ir import CALLER

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    import torch
    from torch import fx

    from autopipe.passes.ir import Phased, StagePhases


class MessageMemory(NamedTuple):
    """The memory that a message is a part of.

    Attributes:
        group: equal for the messages to a stage that share it.
        nbytes: of all of it; 0: of a parameter, a buffer or a constant, which do not count.
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
    messages = _Messages(phased, devices)
    stage = phased.stages[k]
    found = [
        *(messages.value(name, k) for name in stage.receives),
        *(messages.gradient(name, k) for name in stage.tangents),
    ]
    groups: dict[Hashable, int] = {}
    return tuple(
        None
        if memory is None
        else MessageMemory(groups.setdefault(memory.key, len(groups)), memory.nbytes)
        for memory in found
    )


class _Storage(NamedTuple):
    """One storage: what tells it from others, and its size."""

    key: Hashable
    nbytes: int


_STATE = _Storage("state", 0)


class _Messages(NamedTuple):
    """What values and gradients are parts of, at the stages that receive them.

    None stands for a tensor of its own.
    """

    phased: Phased
    devices: Sequence[torch.device]

    def value(self, name: str, k: int) -> _Storage | None:
        """A value that stage k receives from the stage that computes it, or from the caller."""
        source = self.phased.split.routes[name].source
        if source == CALLER:
            # A stage on the CPU gets the caller's tensor itself; elsewhere a copy is assumed.
            at_caller = self.devices[k].type == "cpu"
            return _Storage(("caller", name), self._received(name, k)) if at_caller else None
        if self.devices[source] != self.devices[k]:
            return None
        sender = self.phased.stages[source]
        return self._at_sender(sender, sender.results()["returns"][sender.returns.index(name)])

    def gradient(self, name: str, k: int) -> _Storage | None:
        """A gradient that stage k receives from a later holder of its value, or the caller."""
        route = self.phased.split.routes.get(name)
        later = None if route is None else route.gradient_from(k)
        if later is None or self.devices[later] != self.devices[k]:
            return None
        sender = self.phased.stages[later]
        return self._at_sender(
            sender, sender.results()["sent_grads"][sender.sent_grads.index(name)]
        )

    def _at_sender(self, sender: StagePhases, result: Any) -> _Storage | None:
        """What a stage's result is a part of, for a stage on its device."""
        tensor = _tensor(result)
        if tensor is None:
            return None
        storage = storage_id(tensor)
        for kind, name, placeholder in _arguments(sender):
            given = _tensor(placeholder)
            if given is None or storage_id(given) != storage:
                continue
            if kind == "state":
                return _STATE
            found = (self.value if kind == "value" else self.gradient)(name, sender.index)
            return found or _Storage((kind, name, sender.index), _size(given))
        return _Storage((sender.index, storage), _size(tensor))

    def _received(self, name: str, k: int) -> int:
        """Bytes of a value at a stage that receives it."""
        nodes = (
            n for kind, x, n in _arguments(self.phased.stages[k]) if (kind, x) == ("value", name)
        )
        return sum(_size(t) for t in map(_tensor, nodes) if t is not None)


def _arguments(stage: StagePhases) -> Iterator[tuple[str, str, fx.Node]]:
    """What a stage has and receives: "state", "value" or "gradient", the name, the placeholder."""
    _, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    names = [
        *(("state", name) for name in stage.state),
        *(("value", name) for name in stage.receives),
        *(("gradient", name) for name in stage.tangents),
    ]
    for (kind, name), node in zip(names, placeholders, strict=True):
        yield kind, name, node


def _tensor(node: Any) -> Tensor | None:
    value = None if node is None else node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _size(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())
