"""Compute the bytes that a stage saves and allocates, from its joint graph, before anything runs.

Distinct storages are counted, each as a whole even if only a view of it is saved. Those of
parameters, buffers and constants do not count. `runtime.memory` counts by the same rule at run
time. Workspaces inside a kernel are unknown.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.passes._torch import storage_id
from autopipe.passes.graph import cache_per_graph
from autopipe.passes.ir import phase_functions

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from autopipe.passes.ir import StagePhases

    from .message_memory import MessageMemory


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
        offloaded: the part of `saved` that is on the host between an offload and a fetch.
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
    offloaded: int = 0


_Memory = Mapping[fx.Node, Mapping[Hashable, int]]
"""For each node, the bytes of each distinct storage of its value."""

_Found = tuple[StageBytes, list[int], list[int], list[int]]


def stage_bytes(stage: StagePhases, messages: tuple[MessageMemory | None, ...] = ()) -> StageBytes:
    """Compute what one micro-batch occupies at a traced stage.

    Args:
        stage: its graph.
        messages: the memory of what it receives, as of `shared_messages`; (): each is a tensor of
            its own. Memory that several messages share is counted for the first of them.
    """
    known = _known(stage)
    if messages not in known:
        known[messages] = _computed_bytes(stage, messages)
    found, received, tangents, sums = known[messages]
    return found._replace(
        received=dict(zip(stage.receives, received, strict=True)),
        tangents=dict(zip(stage.tangents, tangents, strict=True)),
        sums=dict(zip(stage.own_grads, sums, strict=True)),
    )


@cache_per_graph
def _known(stage: StagePhases) -> dict[Any, _Found]:
    """What was computed for a graph, by the memory of messages."""
    return {}


def _computed_bytes(stage: StagePhases, messages: Sequence[MessageMemory | None]) -> _Found:
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
    memory = _memory_of(stage, set(state), dict(zip(rest, messages, strict=False)))
    forward_results = [*results["returns"], *results["updates"], *saved]
    sent, own = results["sent_grads"], results["own_grads"]
    sums = sum(_sizes((n for n in own if isinstance(n, fx.Node)), memory).values())
    _, gradients, weights = phase_functions(stage, ("F", "RB", "W"))
    kept = gradients.results[len(sent) :]
    _, recompute, _ = phase_functions(stage, ("F", "R", "BW"))
    arriving = [*saved, *tangents]
    found = StageBytes(
        saved=_total(saved, memory),
        forward=_peak(forward, received, forward_results, memory),
        first_backward=_peak(backward, arriving, [*sent, *own], memory),
        backward=sums + _peak(backward, arriving, sent, memory, set(own)),
        received={},
        tangents={},
        gradients=sums + _peak(gradients.nodes, arriving, gradients.results, memory, set(own)),
        kept=_total(kept, memory),
        weights=sums + _peak(weights.nodes, kept, [], memory, set(own)),
        recompute=sums + _peak(recompute.nodes, saved, recompute.results, memory),
        recomputed=_total(recompute.results, memory),
    )
    return (
        found,
        _each(received, memory),
        _each(tangents, memory),
        [_total([n] if isinstance(n, fx.Node) else [], memory) for n in own],
    )


def _peak(
    calls: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    results: Iterable[Any],
    memory: _Memory,
    accumulated: Container[fx.Node] = (),
) -> int:
    """Return the peak bytes while ops run, if each value is freed after its last use.

    Args:
        calls: the ops, in order.
        inputs: values that exist when they begin; also freed after their last use.
        results: values that still exist when they end.
        memory: what is counted.
        accumulated: gradients that are added to a sum as soon as they are computed. The addition
            allocates a new sum while the old sum and the gradient still exist.
    """
    sizes = _sizes(inputs, memory)
    last = dict.fromkeys(sizes, -1)
    for i, node in enumerate(calls):
        for value in (node, *node.all_input_nodes):
            last.update(dict.fromkeys(_sizes([value], memory), i))
    for storage in _sizes([n for n in results if isinstance(n, fx.Node)], memory):
        last[storage] = len(calls)
    ending: dict[int, list[Any]] = {}
    for storage, i in last.items():
        ending.setdefault(i, []).append(storage)
    alive = dict(sizes)
    now = peak = sum(sizes.values())
    for storage in ending.get(-1, ()):  # inputs that nothing uses
        now -= alive.pop(storage, 0)
    for i, node in enumerate(calls):
        for storage, nbytes in _sizes([node], memory).items():
            if storage not in alive:
                alive[storage] = nbytes
                now += nbytes
        peak = max(peak, now)
        for storage in ending.get(i, ()):
            now -= alive.pop(storage, 0)
        if node in accumulated:
            peak = max(peak, now + 2 * _total([node], memory))
    return peak


def _total(nodes: Sequence[fx.Node], memory: _Memory) -> int:
    return sum(_sizes(nodes, memory).values())


def _each(nodes: Sequence[fx.Node], memory: _Memory) -> list[int]:
    """Bytes of each value; what several share counts for the first."""
    seen: set[Hashable] = set()
    found = []
    for node in nodes:
        sizes = _sizes([node], memory)
        found.append(sum(nbytes for storage, nbytes in sizes.items() if storage not in seen))
        seen.update(sizes)
    return found


def _sizes(nodes: Iterable[fx.Node], memory: _Memory) -> Mapping[Hashable, int]:
    """Return the bytes of each distinct storage of some values."""
    return {storage: nbytes for n in nodes for storage, nbytes in memory[n].items()}


def _memory_of(
    stage: StagePhases, state: Container[fx.Node], messages: Mapping[fx.Node, MessageMemory | None]
) -> _Memory:
    """The storages of all values, except those of `state`.

    A recomputed op has the traced value of the op that it repeats, but makes a tensor of its own:
    it shares a storage only with what it is given.
    """
    found: dict[fx.Node, dict[Hashable, int]] = {}
    identity: dict[fx.Node, dict[int, Hashable]] = {}
    sizes: dict[Hashable, int] = {}
    ignored: set[Hashable] = set()
    for node in stage.graph.nodes:
        given = {s: key for n in node.all_input_nodes for s, key in identity[n].items()}
        identity[node], found[node] = {}, {}
        message = messages.get(node)
        for tensor in _tensors(node):
            storage, nbytes = storage_id(tensor), int(tensor.untyped_storage().nbytes())
            key: Hashable = storage
            if message is not None:
                key, nbytes = ("message", message.group), message.nbytes
            elif storage in given:
                key = given[storage]
            elif stage.phase_of.get(node.name) == "R":
                key = node.name, storage
            identity[node][storage] = key
            if node in state:
                ignored.add(key)
            if key not in ignored:
                found[node][key] = sizes.setdefault(key, nbytes)
    return found


def _tensors(node: fx.Node) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
