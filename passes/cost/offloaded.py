"""Which of the values that a stage saves may be offloaded to the host, and how many bytes that is.

What a stage receives from the caller or from a stage on its device, or passes to one, stays on the
device: others may keep it, so that a copy would free nothing, and the caller may write to it.
Parameters, buffers and constants are there anyway. A storage is offloaded as a whole or not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.passes._torch import storage_id
from autopipe.passes.ir import CALLER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import fx

    from autopipe.passes.ir import Phased


def least_offloaded(phased: Phased) -> int:
    """The size in bytes from which saved values are offloaded, where a stage offloads."""
    sizes = [policy.least_offloaded for policy in phased.remat]
    return min((n for n in sizes if n is not None), default=0)


def leaving_values(phased: Phased, devices: Sequence[torch.device], k: int) -> tuple[int, ...]:
    """The values that a stage may offload, whatever their size.

    Args:
        phased: the traced stages.
        devices: of the stages.
        k: the stage.

    Returns:
        Indices of `StagePhases.saved`; none if the stage's policy does not offload.
    """
    stage, routes = phased.stages[k], phased.split.routes
    if phased.remat[k].least_offloaded is None or not stage.saved:
        return ()
    _, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    received = placeholders[len(stage.state) :]
    staying = [*placeholders[: len(stage.state)]]
    for name, node in zip(stage.receives, received, strict=False):
        source = routes[name].source
        if source == CALLER or devices[source] == devices[k]:
            staying.append(node)
    for name, result in zip(stage.returns, stage.results()["returns"], strict=True):
        route = routes[name]
        if route.output is not None or any(devices[to] == devices[k] for to in route.consumers):
            staying.append(result)
    saved = _saved(phased, k)
    shared = {storage_id(x) for n in staying for x in _tensors(n)}
    shared |= {storage_id(x) for n in saved for x in _tensors(n) if not _is_in_memory(x)}
    return tuple(
        i
        for i, node in enumerate(saved)
        if all(storage_id(x) not in shared for x in _tensors(node))
    )


def _is_in_memory(tensor: Tensor) -> bool:
    """Whether its values are the numbers in its memory, not their conjugates or negatives."""
    return not (tensor.is_conj() or tensor.is_neg())


def offloaded_bytes(phased: Phased, devices: Sequence[torch.device], k: int) -> int:
    """Bytes of what a stage offloads of one micro-batch.

    Args:
        phased: the stages, traced with numbers as sizes.
        devices: of the stages.
        k: the stage.
    """
    least = phased.remat[k].least_offloaded
    may, saved = {*leaving_values(phased, devices, k)}, _saved(phased, k)
    sizes = {
        storage_id(x): int(x.untyped_storage().nbytes()) for i in may for x in _tensors(saved[i])
    }
    return sum(n for n in sizes.values() if least is not None and n >= max(least, 1))


def _saved(phased: Phased, k: int) -> list[fx.Node]:
    stage = phased.stages[k]
    by_name = {n.name: n for n in stage.graph.nodes}
    return [by_name[name] for name in stage.saved]


def _tensors(node: Any) -> Iterator[Tensor]:
    value = None if node is None else node.meta.get("val")
    return (x for x in pytree.tree_leaves(value) if isinstance(x, Tensor))
