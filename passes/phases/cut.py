"""Split -> Phased: cut each stage's joint graph into the phases F, R, B and W (cut in time).

    F  forward: what the stage's results and the new values of its buffers need
    R  recompute: what the backward needs, depends on no tangent, and F did not save
    B  backward: what the gradients of received values need; earlier stages wait for these
    W  weights: the rest, gradients of the stage's own parameters; no stage waits for these

All four follow from reachability in one graph. The only choice is what F saves, which the stage's
rematerialization policy makes (`select_saved`). A call that R recomputes is in the graph twice, so
that every node belongs to one phase.
"""

from __future__ import annotations

import dataclasses
import math
from operator import getitem
from typing import TYPE_CHECKING, Any, TypeAlias

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

    from .request import PhaseRequest, TraceCache

aten = torch.ops.aten

Located: TypeAlias = "tuple[TensorMeta, torch.device]"
"""A value's metadata, and the device it is on."""


def cut_phases(
    request: PhaseRequest,
    size: int,
    cache: TraceCache,
    progress: Callable[[str], None] = lambda text: None,
) -> Phased:
    """Trace every stage at one micro-batch size and cut it into phases.

    Args:
        request: the stages and what they are traced for.
        size: samples in the micro-batch, one of those that `request` has metadata for.
        cache: what was traced so far; grows.
        progress: called with each stage that is traced.

    Raises:
        InputError: a batch norm would see a single value per channel.
    """
    split = request.split
    _check_batch_norm(split, size)
    inputs, known = _propagate_metadata(request, size, cache)
    differentiable = frozenset(
        o.name for o in split.captured.outputs if known[o.name][0].requires_grad
    )
    differentiated = request.differentiated & differentiable or differentiable
    gradients = {n: (_contiguous(known[n][0]), known[n][1]) for n in differentiated}
    stages: list[StagePhases] = []
    for stage, device in reversed(list(zip(split.stages, request.devices, strict=True))):
        arriving = _tangents(split, stage, gradients)
        tangents = [(kind, i, _arrived(gradients[n], device)) for kind, i, n in arriving]
        core = _cut_stage(request, stage, inputs[stage.index], tangents, cache, progress)
        cut = _with_names_of(stage, core, split.captured, [n for *_, n in arriving])
        stages.insert(0, cut)
        for name, node in zip(cut.sent_grads, cut.results()["sent_grads"], strict=True):
            gradients[name] = (TensorMeta.of(node.meta["val"]), device)
    result = Phased(split, size, request.remat, differentiable, differentiated, tuple(stages))
    result.verify()
    return result


def received_strides(phased: Phased) -> dict[tuple[str, int], tuple[int, ...]]:
    """Return the strides with which each stage was traced to receive values and gradients.

    Returns:
        (message, stage) → strides. A message is a value's name, or ``grad name``.
    """
    strides = {}
    for stage in phased.stages:
        _, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
        arriving = placeholders[len(stage.held) :]
        messages = [*stage.receives, *(f"grad {n}" for n in stage.tangents)]
        for message, node in zip(messages, arriving, strict=True):
            strides[message, stage.index] = node.meta["val"].stride()
    return strides


def _propagate_metadata(
    request: PhaseRequest, size: int, cache: TraceCache
) -> tuple[list[list[TensorMeta]], dict[str, Located]]:
    """Compute the metadata of all values between stages, from the first stage to the last.

    Returns:
        For each stage the metadata of its inputs; for each value its metadata and device.
    """
    devices, grad = request.devices, request.grad
    known: dict[str, Located] = {n: (m, devices[0]) for n, m in request.metadata[size].items()}
    inputs: list[list[TensorMeta]] = []
    for stage, device in zip(request.split.stages, devices, strict=True):
        inputs.append([_arrived(known[n], device) for n in stage.signature])
        key: Hashable = (stage.fingerprint, tuple(inputs[-1]), device.type, grad, _autocast(device))
        if key not in cache.results:
            cache.results[key] = forward_metadata(stage, inputs[-1], device, grad=grad)
        found = cache.results[key]
        known |= {n: (meta, device) for n, meta in zip(stage.returns, found, strict=True)}
    return inputs, known


def _cut_stage(
    request: PhaseRequest,
    stage: StageGraph,
    inputs: Sequence[TensorMeta],
    tangents: Sequence[tuple[str, int, TensorMeta]],
    cache: TraceCache,
    progress: Callable[[str], None],
) -> StagePhases:
    """Trace a stage and cut its joint graph, unless an identical stage is in the cache."""
    device, policy = request.devices[stage.index], request.remat[stage.index]
    key: Hashable = (
        *(stage.fingerprint, len(stage.held), len(stage.lent)),
        *(tuple(inputs), tuple(tangents)),
        *(device.type, request.grad, _autocast(device)),
    )
    if (key, policy) not in cache.stages:
        if key not in cache.joints:
            progress(f"tracing stage {stage.index}")
            cache.joints[key] = trace_joint(stage, inputs, tangents, device, grad=request.grad)
        cache.stages[key, policy] = cut_joint(stage, cache.joints[key], policy, device)
    return cache.stages[key, policy]


def _arrived(value: Located, device: torch.device) -> TensorMeta:
    """A value's metadata on the device that uses it: a copy between devices makes it dense."""
    meta, source = value
    return meta if source == device else meta.after_copy()


def _contiguous(meta: TensorMeta) -> TensorMeta:
    """The metadata of an output's gradient, which arrives contiguous."""
    stride = torch.empty(meta.shape, device="meta").stride()
    return meta._replace(stride=stride, requires_grad=False)


def _check_batch_norm(split: Split, size: int) -> None:
    """Refuse batch norm over a single value per channel, as eager execution does."""
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
    """The gradients that `stage` receives: of its results, and of values that later stages use too.

    Returns:
        For each: "return" or "input", the position of its value among these, the value's name.
    """
    result = [("return", i, n) for i, n in enumerate(stage.returns) if n in arriving]
    for i, name in enumerate(stage.signature):
        route = split.routes.get(name)
        if route is None or name not in arriving:
            continue
        last = route.holders[-1] == stage.index
        if not last or route.output is not None:
            result.append(("input", i, name))
    return result


def _with_names_of(
    stage: StageGraph, core: StagePhases, captured: Captured, tangents: Sequence[str]
) -> StagePhases:
    """Give a cut stage the names of `stage`, which is identical to the one that was traced."""
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
    """Cut one joint graph into F, R, B and W by reachability.

    Args:
        stage: gives the names.
        joint: its joint graph.
        policy: chooses what F saves.
        device: for which it was traced.

    Returns:
        The cut stage, without names of tangents. The `call` of its draws is still a position in the
        stage graph.
    """
    ctx, *placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    names = stage.signature
    count = len(names) - len(stage.receives)
    held, rest = placeholders[:count], placeholders[count:]
    received, tangents = rest[: len(stage.receives)], rest[len(stage.receives) :]
    results = results_of(joint.graph)
    forward_results = len(stage.returns) + len(joint.updates)
    forward = _ancestors(results[:forward_results])
    forward |= {n for n in joint.graph.nodes if n.target is getitem and n.args[0] in forward}
    backward = _descendants(tangents)
    saved = set(received)
    if tangents:
        saved = select_saved(
            joint.graph, policy, forward, backward, held, received, forward_results
        )
    forward |= _ancestors(list(saved))
    written = [held[i] for i in joint.updates]
    written_storages = {storage_id_of(n) for n in written}
    saved = {n for n in saved if n in received or storage_id_of(n) not in written_storages}
    rewriter = JointRewriter(forward, backward, saved)
    rewriter.write_placeholders([ctx, *held], received, tangents, written)
    graph = rewriter.write_calls(joint.graph, results[:forward_results], results[forward_results:])
    own_grads = tuple(names[i] for i in joint.grads if i < len(stage.held))
    awaited = _ancestors(results_of(graph)[forward_results + len(own_grads) :])
    return StagePhases(
        index=stage.index,
        graph=graph,
        phase_of=rewriter.phase_of
        | {n.name: "B" for n in awaited if rewriter.phase_of.get(n.name) == "W"},
        saved=tuple(rewriter.saved_names),
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
    """The calls and placeholders that `results` depend on, themselves included."""
    found: set[fx.Node] = set()
    todo = [r for r in results if isinstance(r, fx.Node)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _descendants(sources: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on `sources`, themselves included."""
    found: set[fx.Node] = set()
    todo = list(sources)
    while todo:
        node = todo.pop()
        if node not in found and node.op != "output":
            found.add(node)
            todo.extend(node.users)
    return found
