"""Split → Phased: each stage's joint graph cut into F, R, B and W (the cut in time).

    F  forward: what the stage's results and its buffers' new values need
    R  rematerialize: what the backward needs, needs no tangent, and F did not keep
    B  what the gradients of received values need: the stages before are waiting for it
    W  the rest: gradients of the stage's own parameters; nobody is waiting

All four are reachability in one graph. What F saves is the only choice, and the stage's policy
makes it (`select_saved`). An op that R recomputes is in the graph twice: each node has one phase.
"""

from __future__ import annotations

import dataclasses
import math
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.errors import InputError
from autopipe.passes._torch import storage_id_of
from autopipe.passes.graph import source_line, tensor_spec
from autopipe.passes.ir import (
    Captured,
    Phased,
    Split,
    StageGraph,
    StagePhases,
    at_batch,
    results_of,
)

from .joint_trace import JointGraph, TensorMeta, forward_metadata, trace_joint
from .rematerialize import JointRewriter
from .select_saved import select_saved

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from autopipe.passes.remat_policies import RematPolicy

aten = torch.ops.aten


@dataclasses.dataclass
class TraceCache:
    """What was found out about stages, by everything it depends on: identical ones are traced once.

    looks: what their results look like.
    joints: their joint graphs, whatever is kept.
    stages: their phases.
    """

    looks: dict[Hashable, tuple[TensorMeta, ...]] = dataclasses.field(default_factory=dict)
    joints: dict[Hashable, JointGraph] = dataclasses.field(default_factory=dict)
    stages: dict[Hashable, StagePhases] = dataclasses.field(default_factory=dict)


def phases(
    split: Split,
    size: int,
    looks: Mapping[str, TensorMeta],
    devices: Sequence[torch.device],
    *,
    remat: Sequence[RematPolicy],
    grad: bool,
    differentiated: frozenset[str],
    traced: TraceCache,
    progress: Callable[[str], None] = lambda text: None,
) -> Phased:
    """Trace and cut every stage at one micro-batch size.

    Args:
        split: the stages.
        size: samples in the micro-batch.
        looks: of every placeholder of the captured graph, at this size.
        devices: one per stage; kernels are chosen for them.
        remat: the policy of each stage.
        grad: False for inference: the forward alone, traced under no_grad.
        differentiated: outputs for which a gradient will come, if one can; if it can for none of
            them, all others count.
        traced: what is known so far, and grows.
        progress: told about each stage.

    Raises:
        InputError: a batch norm would see a single value per channel.
    """
    _check_statistics(split, size)
    known = {name: (look, devices[0]) for name, look in looks.items()}
    inputs: list[list[TensorMeta]] = []
    for stage, device in zip(split.stages, devices, strict=True):
        inputs.append([_arrived(known[n], device) for n in stage.signature])
        key: Hashable = (stage.fingerprint, tuple(inputs[-1]), device.type, grad, _autocast(device))
        if key not in traced.looks:
            traced.looks[key] = forward_metadata(stage, inputs[-1], device, grad=grad)
        found = traced.looks[key]
        known |= {n: (look, device) for n, look in zip(stage.returns, found, strict=True)}
    differentiable = frozenset(
        o.name for o in split.captured.outputs if known[o.name][0].requires_grad
    )
    differentiated = differentiated & differentiable or differentiable
    arriving = {n: (_dense(known[n][0]), known[n][1]) for n in differentiated}
    cut: list[StagePhases] = []
    for stage, device in reversed(list(zip(split.stages, devices, strict=True))):
        places = _tangents(split, stage, arriving)
        tangents = [(kind, i, _arrived(arriving[n], device)) for kind, i, n in places]
        held_and_received = inputs[stage.index]
        key = (
            *(stage.fingerprint, len(stage.held), len(stage.lent)),
            *(tuple(held_and_received), tuple(tangents)),
            *(device.type, grad, _autocast(device)),
        )
        if key not in traced.joints:
            progress(f"tracing stage {stage.index}")
            traced.joints[key] = trace_joint(stage, held_and_received, tangents, device, grad=grad)
        kept = (key, remat[stage.index])
        if kept not in traced.stages:
            traced.stages[kept] = cut_joint(stage, traced.joints[key], kept[1], device)
        phased = _named(traced.stages[kept], split.captured, stage, [n for *_, n in places])
        cut.insert(0, phased)
        for name, node in zip(phased.sent_grads, phased.results()["sent_grads"], strict=True):
            arriving[name] = (TensorMeta.of(node.meta["val"]), device)
    result = Phased(split, size, tuple(remat), differentiable, differentiated, tuple(cut))
    result.verify()
    return result


def received_strides(phased: Phased) -> dict[tuple[str, int], tuple[int, ...]]:
    """What each stage was traced to receive: (what, stage) → strides, gradients included."""
    strides = {}
    for stage in phased.stages:
        _, *holders = [n for n in stage.graph.nodes if n.op == "placeholder"]
        rest = holders[len(stage.held) :]
        whats = [*stage.receives, *(f"grad {n}" for n in stage.tangents)]
        for what, node in zip(whats, rest, strict=True):
            strides[what, stage.index] = node.meta["val"].stride()
    return strides


def _arrived(known: tuple[TensorMeta, torch.device], device: torch.device) -> TensorMeta:
    """A tensor's looks where it is used: a copy between devices makes it dense."""
    look, source = known
    return look if source == device else look.settled()


def _dense(look: TensorMeta) -> TensorMeta:
    """The gradient of an output arrives contiguous."""
    dense = torch.empty(look.shape, device="meta").stride()
    return look._replace(stride=dense, requires_grad=False)


def _check_statistics(split: Split, size: int) -> None:
    """Eager refuses to normalise over a single value; so must a micro-batch."""
    for node in split.captured.graph_module.graph.nodes:
        if node.target is not aten.batch_norm.default or not node.args[5]:
            continue
        shape = [at_batch(s, size) for s in tensor_spec(node).shape]
        if math.prod(shape) == shape[1]:
            raise InputError(
                f"batch norm in training needs more than one value per channel, and a micro-batch"
                f" of {size} has one",
                node=node.name,
                source=source_line(node),
                remedy="use fewer chunks or a larger batch",
            )


def _autocast(device: torch.device) -> Hashable:
    enabled = torch.is_autocast_enabled(device.type)
    return enabled and torch.get_autocast_dtype(device.type)


def _tangents(
    split: Split, stage: StageGraph, arriving: Mapping[str, Any]
) -> list[tuple[str, int, str]]:
    """The gradients that will reach `stage`: of what it returns, and sums of what others share."""
    inputs = stage.signature
    result = [("return", i, n) for i, n in enumerate(stage.returns) if n in arriving]
    for i, name in enumerate(inputs):
        route = split.routes.get(name)
        if route is None or name not in arriving:
            continue
        last = route.holders[-1] == stage.index
        if not last or route.output is not None:
            result.append(("input", i, name))
    return result


def _named(
    core: StagePhases, captured: Captured, stage: StageGraph, tangents: list[str]
) -> StagePhases:
    """A cut stage under the names of one that is identical to it."""
    rename = dict(zip(core.held + core.receives, stage.signature, strict=True))
    return dataclasses.replace(
        core,
        index=stage.index,
        held=tuple(stage.signature[: len(core.held)]),
        receives=stage.receives,
        tangents=tuple(tangents),
        returns=stage.returns,
        updates=tuple(rename[n] for n in core.updates),
        own_grads=tuple(rename[n] for n in core.own_grads),
        sent_grads=tuple(rename[n] for n in core.sent_grads),
        draws=tuple(
            d._replace(call=captured.original_position(stage.origins[d.call])) for d in core.draws
        ),
    )


def cut_joint(
    stage: StageGraph, joint: JointGraph, policy: RematPolicy, device: torch.device
) -> StagePhases:
    """Cut one joint graph into F, R, B and W by reachability (its draws are not yet named)."""
    kit, *holders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    names = stage.signature
    count = len(names) - len(stage.receives)
    held, rest = holders[:count], holders[count:]
    received, tangents = rest[: len(stage.receives)], rest[len(stage.receives) :]
    results = results_of(joint.graph)
    ending = len(stage.returns) + len(joint.updates)
    forward = _ancestors(results[:ending])
    forward |= {n for n in joint.graph.nodes if n.target is getitem and n.args[0] in forward}
    late = _descendants(tangents)
    saved = set(received)
    if tangents:
        saved = select_saved(joint.graph, policy, forward, late, held, received, ending)
    forward |= _ancestors(list(saved))
    changing = {storage_id_of(held[i]) for i in joint.updates}
    saved = {n for n in saved if n in received or storage_id_of(n) not in changing}
    rebuild = JointRewriter(forward, late, saved)
    rebuild.placeholders([kit, *held], received, tangents, {held[i] for i in joint.updates})
    graph = rebuild.calls(joint.graph, results[:ending], results[ending:])
    own_grads = tuple(names[i] for i in joint.grads if i < len(stage.held))
    awaited = _ancestors(results_of(graph)[ending + len(own_grads) :])
    return StagePhases(
        index=stage.index,
        graph=graph,
        phase_of=rebuild.phase_of
        | {n.name: "B" for n in awaited if rebuild.phase_of.get(n.name) == "W"},
        saved=tuple(rebuild.kept),
        held=tuple(names[:count]),
        receives=stage.receives,
        tangents=(),
        returns=stage.returns,
        updates=tuple(names[i] for i in joint.updates),
        own_grads=own_grads,
        sent_grads=tuple(names[i] for i in joint.grads if i >= len(stage.held)),
        draws=joint.draws,
        device=device,
    )


def _ancestors(results: Sequence[Any]) -> set[fx.Node]:
    """The calls and placeholders that `results` need, themselves included."""
    found: set[fx.Node] = set()
    todo = [r for r in results if isinstance(r, fx.Node)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _descendants(sources: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(sources)
    while todo:
        node = todo.pop()
        if node not in found and node.op != "output":
            found.add(node)
            todo.extend(node.users)
    return found
