"""Trace one stage graph into one pure joint graph, forward and backward.

The stage runs on fake tensors, with autograd on top, and make_fx records every op that the two
dispatch. Sizes are integers, or symbolic: then one trace serves all sizes that satisfy its
conditions. AOTAutograd's functional tensors turn in-place ops and views into pure
ones. So the joint graph contains the kernels that eager autograd would execute, in its order.

`torch.autograd.grad` computes the gradients that a stage sends to other stages. Its arguments
include the tangents of the stage's results. For a received value that later stages use too, they
also include the sum of those stages' gradients, as a tangent of the stage's *input itself*.
Autograd adds such a tangent before any contribution of this stage: the order in which it would sum
the contributions in the whole graph.

(AOTAutograd's own joint export guesses the strides of tangents and drops tangents of results that
alias an input. Both are known here, so its components are used directly.)
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, fx

from autopipe.errors import CaptureError, describe
from autopipe.passes._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FunctionalTensorMode,
    from_functional,
    make_fx,
    preserve_node_meta,
    to_functional,
)
from autopipe.passes._torch_modes import without_autocast
from autopipe.passes._torch_patches import record_checks_unordered, silent_logs
from autopipe.passes.kernels import correct_results

from .function_constants import inline_constants, watch_constants
from .lower_random import lower_joint_graph
from .lower_sizes import lower_sizes
from .metadata import TensorMeta
from .stage_runner import run_on_device, uncached_autocast
from .trace_sizes import SharedSymbols, TraceSizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import sympy

    from autopipe.passes.ir import RandomDraw, Sizes, StageGraph
    from autopipe.passes.kernels import Capability

aten = torch.ops.aten

Conditions: TypeAlias = "tuple[sympy.Basic, ...]"

NO_SIZES: Sizes = MappingProxyType({})
"""The values of no symbols, for metadata that has none."""


@dataclass(frozen=True)
class JointGraph:
    """A traced stage: its forward and backward as one pure graph.

    Placeholders: the runtime's `ctx`, the stage's state (parameters, buffers, constants),
    received values, tangents. Results: returned values, new values of buffers, gradients.

    Attributes:
        graph: the joint graph.
        updates: positions among the state of the buffers whose new values are results.
        grads: positions among state and received values of those whose gradients are results.
        draws: the key of each random draw, with the position of its op in the stage graph.
        conditions: on the symbols of symbolic sizes, under which the graph holds.
    """

    graph: fx.Graph
    updates: tuple[int, ...]
    grads: tuple[int, ...]
    draws: tuple[RandomDraw, ...]
    conditions: Conditions = ()


@dataclass(frozen=True)
class ForwardMetadata:
    """Metadata of a stage's results.

    Attributes:
        results: one per result.
        conditions: on the symbols of symbolic sizes, under which it holds.
    """

    results: tuple[TensorMeta, ...]
    conditions: Conditions = ()


def forward_metadata(
    stage: StageGraph,
    inputs: Sequence[TensorMeta],
    device: torch.device,
    *,
    grad: bool,
    example: Sizes = NO_SIZES,
    shared: SharedSymbols | None = None,
    kernels: Capability | None = None,
) -> ForwardMetadata:
    """Compute the metadata of a stage's results without tracing it.

    Args:
        stage: runs on fake tensors.
        inputs: metadata of its state, then of received tensors.
        device: where the stage will run.
        grad: whether gradients are recorded.
        example: values of the symbols in `inputs`.
        shared: with which other traces the symbols are shared.
        kernels: see `trace_joint`.
    """
    sizes = TraceSizes(inputs, example, shared)
    with (
        silent_logs(),
        sizes.fake_mode(),
        sizes.remembered(),
        record_checks_unordered(),
        uncached_autocast(),
        torch.set_grad_enabled(grad),
    ):
        plain = [sizes.fake(meta, device) for meta in inputs]
        with FunctionalTensorMode():
            leaves = [
                to_functional(x).requires_grad_(meta.requires_grad)
                for x, meta in zip(plain, inputs, strict=True)
            ]
            results = run_on_device(stage, leaves, device, kernels)
            found = tuple(
                TensorMeta.of(from_functional(r))._replace(requires_grad=grad and r.requires_grad)
                for r in results
            )
    return ForwardMetadata(found, sizes.conditions())


def trace_joint(
    stage: StageGraph,
    inputs: Sequence[TensorMeta],
    arriving: Sequence[tuple[str, int, TensorMeta]],
    device: torch.device,
    *,
    grad: bool,
    example: Sizes = NO_SIZES,
    shared: SharedSymbols | None = None,
    kernels: Capability | None = None,
) -> JointGraph:
    """Trace a stage.

    Args:
        stage: its graph is run with every device in it replaced by `device`.
        inputs: metadata of its state, then of received tensors.
        arriving: for each tangent that the stage will receive: "return" or "input", the position of
            its value among these, and its metadata.
        device: where the stage will run; kernels are chosen for it.
        grad: False traces the forward alone, under no_grad.
        example: values of the symbols in the metadata.
        shared: with which other traces the symbols are shared.
        kernels: the compute capability of the CUDA device whose kernels are traced, for a plan; the
            graph cannot run. None: the kernels of `device`.

    Returns:
        The joint graph, with its random ops replaced by keyed draws.

    Raises:
        CaptureError: a shape depends on the values of tensors, or a custom autograd.Function uses a
            tensor that is not one of its arguments.
    """
    sizes = TraceSizes([*inputs, *(meta for _, _, meta in arriving)], example, shared)
    updates: list[int] = []
    grads: list[int] = []
    differentiable = [i for i, meta in enumerate(inputs) if meta.requires_grad]
    wanted = differentiable if grad else []

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
        before = list(primals)
        with FunctionalTensorMode():
            outer = [to_functional(x) for x in primals]
            # For a forward alone too: matmul chooses its kernel by requires_grad.
            leaves = [
                x.detach().requires_grad_() if i in differentiable else x
                for i, x in enumerate(outer)
            ]
            with torch.set_grad_enabled(grad):
                results = run_on_device(stage, leaves, device, kernels)
            gradients: list[tuple[int, Tensor | None]] = []
            if arriving and wanted:
                values = {"return": results, "input": leaves}
                with (
                    without_autocast(device),
                    torch.autograd.set_multithreading_enabled(False),
                ):
                    found = _gradients(
                        [values[kind][i] for kind, i, _ in arriving],
                        [leaves[i] for i in wanted],
                        [to_functional(t) for t in tangents],
                    )
                gradients = list(zip(wanted, found, strict=True))
            plain = [from_functional(_resolved(r.detach())) for r in results]
            now = [from_functional(x) for x in outer]
            updates[:] = [i for i, x in enumerate(now) if x is not before[i]]
            pairs = [(i, from_functional(_resolved(g))) for i, g in gradients if g is not None]
        grads[:] = [i for i, _ in pairs]
        return plain + [now[i] for i in updates] + [g for _, g in pairs]

    with sizes.fake_mode(), sizes.remembered(), _recording(stage):
        primals = [sizes.fake(meta, device) for meta in inputs]
        tangents_ = [sizes.fake(meta, device) for _, _, meta in arriving]
        module = _recorded(joint)(primals, tangents_)
    inline_constants(stage, module)
    calls = enumerate(stage.graph_module.graph.nodes)
    static = {position for position, node in calls if node.meta.get("static")}
    draws = lower_joint_graph(module.graph, static)
    correct_results(module.graph, kernels)
    conditions = sizes.conditions()
    lower_sizes(module.graph)
    return JointGraph(module.graph, tuple(updates), tuple(grads), draws, conditions)


@contextmanager
def _recording(stage: StageGraph) -> Iterator[None]:
    with (
        silent_logs(),
        record_checks_unordered(),
        preserve_node_meta(),
        uncached_autocast(),
        watch_constants(stage),
    ):
        yield


_recorded = functools.partial(
    make_fx,
    _allow_non_fake_inputs=True,
    _disable_torch_fn_metadata_mode=True,  # nobody reads which torch function ran; it takes a tenth
)


def _gradients(
    results: list[Tensor], leaves: list[Tensor], tangents: list[Tensor]
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(results, leaves, tangents, allow_unused=True)
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise CaptureError(
            "a shape in the backward depends on the values of tensors",
            found=describe(error),
            remedy="use torch.where instead of index_fill and similar calls",
        ) from error


def _resolved(tensor: Tensor) -> Tensor:
    """Materialize lazy conjugation and negation, which `TensorMeta` does not describe."""
    return tensor.resolve_conj().resolve_neg()
