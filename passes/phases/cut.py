"""Split -> Phased: trace every stage and cut its joint graph into phases.

A walk from the first stage to the last computes the metadata of all values between stages. A walk
back traces each stage with the gradients that it receives. Identical stages are traced once.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
import torch

from autopipe.passes._torch_modes import has_autocast
from autopipe.passes.ir import Captured, Phased, Split, StageGraph, StagePhases
from autopipe.passes.kernels import planned_autocast

from .assign_phases import cut_joint
from .batch_norm import check_batch_norms
from .joint_trace import ForwardMetadata, forward_metadata, trace_joint
from .metadata import TensorMeta
from .request import first_that_holds
from .trace_sizes import SharedSymbols

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from autopipe.passes.ir import Sizes
    from autopipe.passes.kernels import Capability

    from .request import PhaseRequest, TraceCache

Located: TypeAlias = "tuple[TensorMeta, torch.device]"
"""A value's metadata, and the device it is on."""


def cut_phases(
    request: PhaseRequest,
    size: int,
    cache: TraceCache,
    progress: Callable[[str], None] = lambda text: None,
) -> Phased:
    """Trace every stage for one micro-batch size and cut it into phases.

    Args:
        request: the stages and their metadata, devices and policies. If sizes in the metadata are
            symbolic, so they are in the phases.
        size: samples in the micro-batch, one of those that `request` has metadata for.
        cache: stages that were traced so far; new ones are added.
        progress: called with a text for each stage that is traced.

    Raises:
        InputError: a batch norm would see a single value per channel.
    """
    split = request.split
    sizes = request.sizes(size)
    check_batch_norms(split.captured, sizes)
    shared = SharedSymbols()
    inputs, known, conditions = _propagate_metadata(request, size, cache, shared)
    differentiable = frozenset(
        o.name for o in split.captured.outputs if known[o.name][0].requires_grad
    )
    differentiated = request.differentiated & differentiable or differentiable
    gradients = {n: (known[n][0].contiguous(sizes), known[n][1]) for n in differentiated}
    stages: list[StagePhases] = []
    for stage, device in reversed(list(zip(split.stages, request.devices, strict=True))):
        arriving = _tangents(split, stage, gradients, exact=request.exact)
        tangents = [(kind, i, _arrived(gradients[n], device, sizes)) for kind, i, n in arriving]
        core = _cut_stage(
            request, stage, inputs[stage.index], tangents, sizes, cache, shared, progress
        )
        conditions |= dict.fromkeys(core.conditions)
        cut = _with_names_of(stage, core, split.captured, [n for *_, n in arriving])
        stages.insert(0, cut)
        for name, node in zip(cut.sent_grads, cut.results()["sent_grads"], strict=True):
            gradients[name] = (TensorMeta.of(node.meta["val"]), device)
    result = Phased(
        split,
        size,
        request.remat,
        differentiable,
        differentiated,
        tuple(stages),
        request.symbols(size),
        tuple(conditions),
    )
    result.verify()
    return result


def received_strides(phased: Phased, sizes: Sizes) -> dict[tuple[str, int], tuple[int, ...]]:
    """Return the strides of received values and gradients with which each stage was traced.

    Args:
        phased: the stages.
        sizes: the values of its symbols.

    Returns:
        (message, stage) → strides. A message is a value's name, or ``grad name``.
    """
    strides = {}
    for stage in phased.stages:
        _, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
        arriving = placeholders[len(stage.state) :]
        messages = [*stage.receives, *(f"grad {n}" for n in stage.tangents)]
        for message, node in zip(messages, arriving, strict=True):
            strides[message, stage.index] = TensorMeta.of(node.meta["val"]).at(sizes).stride
    return strides


def _propagate_metadata(
    request: PhaseRequest, size: int, cache: TraceCache, shared: SharedSymbols
) -> tuple[list[list[TensorMeta]], dict[str, Located], dict[sympy.Basic, None]]:
    """Compute the metadata of all values between stages, from the first stage to the last.

    With symbolic sizes, a stage runs with the sizes of the example, and the shapes of its results
    are those of the captured graph: running it with symbols takes as long as its trace's forward.

    Returns:
        For each stage the metadata of its inputs; for each value its metadata and device; the
        conditions on symbols under which they hold.
    """
    sizes, conditions = request.sizes(size), dict[sympy.Basic, None]()
    devices = request.devices
    known: dict[str, Located] = {n: (m, devices[0]) for n, m in request.metadata[size].items()}
    inputs: list[list[TensorMeta]] = []
    for stage, device in zip(request.split.stages, devices, strict=True):
        inputs.append([_arrived(known[n], device, sizes) for n in stage.signature])
        results = _results_of(request, stage, inputs[-1], size, cache, shared)
        known |= {n: (meta, device) for n, meta in zip(stage.returns, results.results, strict=True)}
        conditions |= dict.fromkeys(results.conditions)
    return inputs, known, conditions


def _results_of(
    request: PhaseRequest,
    stage: StageGraph,
    inputs: Sequence[TensorMeta],
    size: int,
    cache: TraceCache,
    shared: SharedSymbols,
) -> ForwardMetadata:
    """The metadata of a stage's results, with the symbols of its inputs."""
    sizes, device, grad = request.sizes(size), request.devices[stage.index], request.grad
    kernels = request.kernels_of(stage.index)

    def run(inputs: Sequence[TensorMeta]) -> ForwardMetadata:
        key: Hashable = (stage.fingerprint, tuple(inputs), grad, *_kernels(device, kernels))
        traced = cache.results.setdefault(key, [])
        found = first_that_holds(traced, sizes)
        if found is None:
            found = forward_metadata(
                *(stage, inputs, device),
                grad=grad,
                example=sizes,
                shared=shared,
                kernels=kernels,
            )
            traced.append(found)
        return found

    if not any(meta.is_symbolic for meta in inputs):
        return run(inputs)
    symbols = request.symbols(size)
    values = {s: sympy.Integer(n) for s, n in sizes.items() if s not in symbols}
    found = run([meta.at(sizes) for meta in inputs])
    shapes = (request.split.routes[name].spec.full_shape for name in stage.returns)
    results = [
        meta.with_shape([n.xreplace(values) for n in shape], sizes)
        for meta, shape in zip(found.results, shapes, strict=True)
    ]
    if any(meta is None for meta in results):
        return run(inputs)
    return ForwardMetadata(tuple(meta for meta in results if meta is not None))


def _cut_stage(
    request: PhaseRequest,
    stage: StageGraph,
    inputs: Sequence[TensorMeta],
    tangents: Sequence[tuple[str, int, TensorMeta]],
    sizes: Sizes,
    cache: TraceCache,
    shared: SharedSymbols,
    progress: Callable[[str], None],
) -> StagePhases:
    """Trace a stage and cut its joint graph, unless an identical stage is in the cache."""
    device, policy = request.devices[stage.index], request.remat[stage.index]
    kernels = request.kernels_of(stage.index)
    key: Hashable = (
        *(stage.fingerprint, len(stage.held), len(stage.shared)),
        *(tuple(inputs), tuple(tangents)),
        *(request.grad, *_kernels(device, kernels)),
    )
    cuts = cache.stages.setdefault((key, policy, request.exact), [])
    cut = first_that_holds(cuts, sizes)
    if cut is None:
        joints = cache.joints.setdefault(key, [])
        joint = first_that_holds(joints, sizes)
        if joint is None:
            progress(f"tracing stage {stage.index}")
            joint = trace_joint(
                *(stage, inputs, tangents, device),
                grad=request.grad,
                example=sizes,
                shared=shared,
                kernels=kernels,
            )
            joints.append(joint)
        cut = cut_joint(stage, joint, policy, device, exact=request.exact)
        cut = dataclasses.replace(cut, kernels=kernels)
        cuts.append(cut)
    return cut


def _arrived(value: Located, device: torch.device, sizes: Sizes) -> TensorMeta:
    """A value's metadata on the device that uses it: a copy between devices is dense."""
    meta, source = value
    return meta if source == device else meta.after_copy(sizes)


def _kernels(device: torch.device, kernels: Capability | None) -> tuple[Hashable, ...]:
    """What the choice of kernels depends on: device type, planned device, autocast."""
    if kernels is not None:
        return (device.type, kernels, planned_autocast(device))
    enabled = has_autocast(device) and torch.is_autocast_enabled(device.type)
    return (device.type, None, enabled and torch.get_autocast_dtype(device.type))


def _tangents(
    split: Split, stage: StageGraph, arriving: Mapping[str, Any], *, exact: bool
) -> list[tuple[str, int, str]]:
    """The gradients that `stage` receives: of its results, and of values that later stages use too.

    Unless sums are `exact`, later stages keep their part of a shared parameter's gradient.

    Returns:
        For each: "return" or "input", the position of its value among these, the value's name.
    """
    result = [("return", i, n) for i, n in enumerate(stage.returns) if n in arriving]
    for i, name in enumerate(stage.signature):
        route = split.routes.get(name)
        if route is None or name not in arriving:
            continue
        last = route.holders[-1] == stage.index
        if route.output is not None if last else exact or route.kind != "parameter":
            result.append(("input", i, name))
    return result


def _with_names_of(
    stage: StageGraph, core: StagePhases, captured: Captured, tangents: Sequence[str]
) -> StagePhases:
    """Rename a cut stage's values to those of `stage`, which is identical to the traced stage."""
    rename = dict(zip(core.state + core.receives, stage.signature, strict=True))
    return dataclasses.replace(
        core,
        index=stage.index,
        state=tuple(stage.signature[: len(core.state)]),
        receives=stage.receives,
        tangents=tuple(tangents),
        returns=stage.returns,
        updates=tuple(rename[n] for n in core.updates),
        own_grads=tuple(rename[n] for n in core.own_grads),
        sent_grads=tuple(rename[n] for n in core.sent_grads),
        draws=tuple(
            d._replace(call=captured.call_index(stage.origins[d.call])) for d in core.draws
        ),
    )
