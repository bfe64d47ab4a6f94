"""Compute the bytes that a stage saves and allocates, from its joint graph, before anything runs.

Distinct storages are counted, each as a whole even if only a view of it is saved. Those of
parameters, buffers and constants do not count. `runtime.memory` counts by the same rule at run
time. Workspaces inside a kernel are unknown.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.passes._torch import storage_id
from autopipe.passes.graph import cache_per_graph
from autopipe.passes.ir import phase_functions

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from autopipe.passes.ir import StagePhases


class StageBytes(NamedTuple):
    """Bytes that one micro-batch occupies at a stage, in addition to parameters and buffers.

    Attributes:
        saved: what F saves for the backward.
        forward: peak while F runs, received values included.
        first_backward: peak while R, B and W run for the first micro-batch of a step: includes
            saved values, received gradients, and the new parameter gradients.
        backward: the same for a later micro-batch, which starts with the sums of parameter
            gradients allocated.
        received: size of each value that the stage receives, by name.
        tangents: size of each gradient that it receives, by the name of the value it belongs to.
        gradients: as `backward`, while R and B run, where W runs later.
        kept: what is saved from then on for W.
        weights: peak while W runs.
        recompute: peak while R runs as an action of its own.
        recomputed: what is then saved for B and W.
        sums: size of the sum of each parameter gradient that the stage adds up, by the parameter.
    """

    saved: int
    forward: int
    first_backward: int
    backward: int
    received: Mapping[str, int]
    tangents: Mapping[str, int]
    gradients: int = 0
    kept: int = 0
    weights: int = 0
    recompute: int = 0
    recomputed: int = 0
    sums: Mapping[str, int] = MappingProxyType({})


def stage_bytes(stage: StagePhases) -> StageBytes:
    """Compute what one micro-batch occupies at a traced stage."""
    found, received, tangents, sums = _stage_bytes(stage)
    return found._replace(
        received=dict(zip(stage.receives, received, strict=True)),
        tangents=dict(zip(stage.tangents, tangents, strict=True)),
        sums=dict(zip(stage.own_grads, sums, strict=True)),
    )


@cache_per_graph
def _stage_bytes(stage: StagePhases) -> tuple[StageBytes, list[int], list[int], list[int]]:
    """`StageBytes` without the fields by name; the sizes that belong in `received`, `tangents` and
    `sums`. (Identical stages share a graph, but not their names.)
    """
    _, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    state, rest = placeholders[: len(stage.state)], placeholders[len(stage.state) :]
    received, tangents = rest[: len(stage.receives)], rest[len(stage.receives) :]
    results = stage.results()
    by_name = {n.name: n for n in stage.graph.nodes}
    saved = [by_name[name] for name in stage.saved]
    forward = [n for n in stage.graph.nodes if stage.phase_of.get(n.name) == "F"]
    backward = [n for n in stage.graph.nodes if stage.phase_of.get(n.name, "F") != "F"]
    ignored = {storage_id(t) for n in state for t in _tensors(n)}
    forward_results = [*results["returns"], *results["updates"], *saved]
    sent, own = results["sent_grads"], results["own_grads"]
    sums = sum(_sizes([n for n in own if isinstance(n, fx.Node)], ignored).values())
    _, gradients, weights = phase_functions(stage, ("F", "RB", "W"))
    kept = gradients.results[len(sent) :]
    _, recompute, _ = phase_functions(stage, ("F", "R", "BW"))
    arriving = [*saved, *tangents]
    found = StageBytes(
        saved=_total(saved, ignored),
        forward=_peak(forward, received, forward_results, ignored),
        first_backward=_peak(backward, arriving, [*sent, *own], ignored),
        backward=sums + _peak(backward, arriving, sent, ignored, set(own)),
        received={},
        tangents={},
        gradients=sums + _peak(gradients.nodes, arriving, gradients.results, ignored, set(own)),
        kept=_total(kept, ignored),
        weights=sums + _peak(weights.nodes, kept, [], ignored, set(own)),
        recompute=sums + _peak(recompute.nodes, saved, recompute.results, ignored),
        recomputed=_total(recompute.results, ignored),
    )
    return (
        found,
        [_total([node], ignored) for node in received],
        [_total([node], ignored) for node in tangents],
        [_total([n] if isinstance(n, fx.Node) else [], ignored) for n in own],
    )


def _peak(
    calls: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    results: Iterable[Any],
    ignored: set[Any],
    accumulated: Container[fx.Node] = (),
) -> int:
    """Return the peak bytes while ops run, if each value is freed after its last use.

    Args:
        calls: the ops, in order.
        inputs: values that exist when they begin; also freed after their last use.
        results: values that still exist when they end.
        ignored: storages that are not counted.
        accumulated: gradients that are added to a sum as soon as they are computed. The addition
            allocates a new sum while the old sum and the gradient still exist.
    """
    sizes = _sizes(inputs, ignored)
    last = dict.fromkeys(sizes, -1)
    for i, node in enumerate(calls):
        for value in (node, *node.all_input_nodes):
            last.update(dict.fromkeys(_sizes([value], ignored), i))
    for storage in _sizes([n for n in results if isinstance(n, fx.Node)], ignored):
        last[storage] = len(calls)
    ending: dict[int, list[Any]] = {}
    for storage, i in last.items():
        ending.setdefault(i, []).append(storage)
    alive = dict(sizes)
    now = peak = sum(sizes.values())
    for storage in ending.get(-1, ()):  # inputs that nothing uses
        now -= alive.pop(storage, 0)
    for i, node in enumerate(calls):
        for storage, nbytes in _sizes([node], ignored).items():
            if storage not in alive:
                alive[storage] = nbytes
                now += nbytes
        peak = max(peak, now)
        for storage in ending.get(i, ()):
            now -= alive.pop(storage, 0)
        if node in accumulated:
            peak = max(peak, now + 2 * _total([node], ignored))
    return peak


def _total(nodes: Sequence[fx.Node], ignored: set[Any]) -> int:
    return sum(_sizes(nodes, ignored).values())


def _sizes(nodes: Sequence[fx.Node], ignored: set[Any]) -> Mapping[Any, int]:
    """Return the bytes of each distinct storage of some values."""
    return {
        storage: int(t.untyped_storage().nbytes())
        for n in nodes
        for t in _tensors(n)
        if (storage := storage_id(t)) not in ignored
    }


def _tensors(node: fx.Node) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
