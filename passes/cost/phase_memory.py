"""What a stage keeps and makes, in bytes, read off its joint graph before anything runs.

Counted are distinct storages, whole even if only a view of one is kept, without those of
parameters, buffers and constants: what `runtime.memory` counts while it runs. What kernels use
within one call (workspaces) is not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.passes._torch import storage_id
from autopipe.passes.graph import cache_per_graph

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from autopipe.passes.ir import StagePhases


class StageBytes(NamedTuple):
    """What one micro-batch occupies at a stage, beside what the stage holds anyway.

    Attributes:
        saved: what F keeps for the backward.
        forward: the most that is there at once while F runs, what it received included.
        first_backward: the most while R, B and W run, what was saved and the gradients that it
            received included, and those of its parameters, which it is the first to make.
        backward: likewise, of a later micro-batch: the sums of gradients are there all the time.
        received: sizes of the values that it receives, by name.
        tangents: sizes of the gradients that it receives, by the names of what they are of.
    """

    saved: int
    forward: int
    first_backward: int
    backward: int
    received: Mapping[str, int]
    tangents: Mapping[str, int]


def stage_bytes(stage: StagePhases) -> StageBytes:
    """What one micro-batch occupies at a traced stage."""
    saved, forward, first_backward, backward, received, tangents = _stage_bytes(stage)
    return StageBytes(
        saved,
        forward,
        first_backward,
        backward,
        dict(zip(stage.receives, received, strict=True)),
        dict(zip(stage.tangents, tangents, strict=True)),
    )


@cache_per_graph
def _stage_bytes(stage: StagePhases) -> tuple[Any, ...]:
    """The same without names, which identical stages do not share: sizes in their order."""
    _, *holders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    held, rest = holders[: len(stage.held)], holders[len(stage.held) :]
    received, tangents = rest[: len(stage.receives)], rest[len(stage.receives) :]
    results = stage.results()
    by_name = {n.name: n for n in stage.graph.nodes}
    saved = [by_name[name] for name in stage.saved]
    first = [n for n in stage.graph.nodes if stage.phase_of.get(n.name) == "F"]
    later = [n for n in stage.graph.nodes if stage.phase_of.get(n.name, "F") != "F"]
    ignored = {storage_id(t) for n in held for t in _tensors(n)}
    made = [*results["returns"], *results["updates"], *saved]
    sent, own = results["sent_grads"], results["own_grads"]
    sums = sum(_sizes([n for n in own if isinstance(n, fx.Node)], ignored).values())
    return (
        _total(saved, ignored),
        _peak(first, received, made, ignored),
        _peak(later, [*saved, *tangents], [*sent, *own], ignored),
        sums + _peak(later, [*saved, *tangents], sent, ignored, set(own)),
        [_total([node], ignored) for node in received],
        [_total([node], ignored) for node in tangents],
    )


def _peak(
    calls: Sequence[fx.Node],
    given: Sequence[fx.Node],
    kept: Iterable[Any],
    ignored: set[Any],
    added: Container[fx.Node] = (),
) -> int:
    """The most bytes there at once while `calls` run: values go after their last use.

    Args:
        calls: in order.
        given: what is there when they begin, and goes after its last use.
        kept: what is still there when they end.
        ignored: storages that do not count.
        added: gradients that are added to a sum as soon as they are made: the second one makes a
            new sum, while both are there.
    """
    sizes = _sizes(given, ignored)
    last = dict.fromkeys(sizes, -1)
    for i, node in enumerate(calls):
        for value in (node, *node.all_input_nodes):
            last.update(dict.fromkeys(_sizes([value], ignored), i))
    for storage in _sizes([n for n in kept if isinstance(n, fx.Node)], ignored):
        last[storage] = len(calls)
    ending: dict[int, list[Any]] = {}
    for storage, i in last.items():
        ending.setdefault(i, []).append(storage)
    there = dict(sizes)
    now = peak = sum(sizes.values())
    for storage in ending.get(-1, ()):  # nothing uses it
        now -= there.pop(storage, 0)
    for i, node in enumerate(calls):
        for storage, nbytes in _sizes([node], ignored).items():
            if storage not in there:
                there[storage] = nbytes
                now += nbytes
        peak = max(peak, now)
        for storage in ending.get(i, ()):
            now -= there.pop(storage, 0)
        if node in added:
            peak = max(peak, now + 2 * _total([node], ignored))
    return peak


def _total(nodes: Sequence[fx.Node], ignored: set[Any]) -> int:
    return sum(_sizes(nodes, ignored).values())


def _sizes(nodes: Sequence[fx.Node], ignored: set[Any]) -> Mapping[Any, int]:
    """Bytes of the distinct storages of some values."""
    return {
        storage: int(t.untyped_storage().nbytes())
        for n in nodes
        for t in _tensors(n)
        if (storage := storage_id(t)) not in ignored
    }


def _tensors(node: fx.Node) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
