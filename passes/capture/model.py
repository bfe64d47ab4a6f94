"""Capture a model: module and example inputs → `Captured`, one flat graph of ATen ops.

The steps of `capture`, in order: trace the model and normalize its graph (`tracing`, which refuses
what torch.export would silently get wrong); collect the batch sizes for which the graph is valid
(`size_guards`); turn writes to buffers into results (`buffer_mutation`); give each result a rule
that combines micro-batches (`autopipe.passes.batch`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.errors import CaptureError, UnsupportedError
from autopipe.passes._torch import free_unbacked_symbols
from autopipe.passes.batch import STATIC, Reduced, combine, decide_by_trial, propagate_states
from autopipe.passes.graph import full_size
from autopipe.passes.ir import (
    NOTHING_READ,
    SINGLE_SAMPLE,
    B,
    Captured,
    Input,
    InputKind,
    ResultLeaf,
    SizeGuards,
    results_of,
)
from autopipe.passes.ops import recorded_functions

from .buffer_assignment import read_buffer_copies
from .buffer_mutation import defer_buffer_writes, refuse_batched_writes
from .explain import fixed_size_error
from .flat_module import FlatModel, TensorSlot
from .hidden_state import refuse_written_constants
from .size_guards import collect_guards
from .tracing import Trace, trace_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.utils import _pytree as pytree

    from autopipe.passes.batch import CombinedGraph

    from .request import CaptureRequest
    from .size_uses import SizeUses


def capture(request: CaptureRequest) -> Captured:
    """Trace `model(*args, **kwargs)` once, with the batch dimension symbolic.

    Args:
        request: the model, its example inputs, and how micro-batches will be used.

    Returns:
        A verified `Captured`, which refers to the model's own tensors by name.

    Raises:
        CaptureError: control flow that depends on data, a batch size fixed by the model, a tensor
            hook (its gradient would be lost), a result that is neither a tensor nor a known
            container.
        UnsupportedError: only some batch sizes are possible; a buffer is used in a way that
            micro-batches cannot reproduce.
        CouplingError: an output that cannot be combined from micro-batches.
    """
    with recorded_functions() as functions:
        trace = trace_model(request)
    refuse_written_constants(trace.normalized, FlatModel.prefix)
    inputs = _describe_inputs(trace, request)
    sizes = _supported_sizes(trace, inputs)
    _prepare_buffers(trace, inputs, request)
    notes: list[str] = []
    if request.whole or request.single:
        combined = _combine_one(trace, inputs)
    else:
        combined, notes = _combine_many(trace, inputs, request)
    captured = Captured(
        graph_module=combined.graph_module,
        inputs=inputs,
        outputs=combined.outputs,
        constants=trace.normalized.constants,
        epilogue=combined.epilogue,
        leaves=_result_leaves(trace, combined.leaves),
        out_spec=_result_spec(trace),
        updates=combined.updates,
        size_guards=sizes,
        number_guards=trace.numbers,
        lengths=trace.lengths.lengths,
        derived_sizes=trace.lengths.derived,
        reads=trace.result.reads or NOTHING_READ,
        notes=(*trace.result.notes, *notes),
        functions=functions,
    )
    captured.verify()
    return captured


def _describe_inputs(trace: Trace, request: CaptureRequest) -> tuple[Input, ...]:
    """Describe the graph's placeholders; inputs of the call by their position among its leaves."""

    def of_call(item: Input) -> Input:
        position = trace.positions[item.index]
        return dataclasses.replace(
            item,
            index=position,
            batch_dim=request.batch_dims[position],
            requires_grad=request.leaves[position].requires_grad,
        )

    inputs = trace.normalized.inputs
    return tuple(of_call(i) if i.kind is InputKind.INPUT else i for i in inputs)


def _supported_sizes(trace: Trace, inputs: Sequence[Input]) -> SizeGuards:
    """The sizes for which the graph computes the same as the model."""
    graph, conditions = trace.normalized.graph, trace.sizes.conditions
    traced = {length.name: length.example for length in trace.lengths.lengths}
    if trace.batch is not None:
        _check_batch_is_symbolic(inputs, trace.sizes)
        return collect_guards(graph, conditions, {B: trace.batch, **traced})
    if not traced:
        return SINGLE_SAMPLE
    of_lengths = collect_guards(graph, conditions, {B: 1, **traced}).conditions
    return SizeGuards((*SINGLE_SAMPLE.conditions, *of_lengths))


def _check_batch_is_symbolic(inputs: Sequence[Input], uses: SizeUses) -> None:
    for item in inputs:
        if item.kind is not InputKind.INPUT or item.batch_dim is None:
            continue
        size = item.spec.shape[item.batch_dim]
        if not size.free_symbols:
            raise fixed_size_error(item, uses)
        if not size.is_Symbol:
            raise UnsupportedError(
                "the model allows only some batch sizes",
                node=item.name,
                found=f"a batch of {size}",
            )


def _prepare_buffers(trace: Trace, inputs: Sequence[Input], request: CaptureRequest) -> None:
    """Check batch norms; copy assigned buffers where each micro-batch writes to them."""
    micro = request.batch_norm == "micro"
    if trace.cumulative and micro:
        raise UnsupportedError(
            "a cumulative average (momentum=None) of micro-batches",
            node=trace.cumulative[0],
            remedy='use batch_norm="deferred"',
        )
    if request.whole or request.single or micro:
        read_buffer_copies(trace.normalized.graph, _assigned_buffers(trace, inputs))


def _assigned_buffers(trace: Trace, inputs: Sequence[Input]) -> list[fx.Node]:
    """The placeholders of buffers that the forward assigns; some buffers have several names."""
    module, graph = trace.module, trace.normalized.graph
    tensors = {id(module.get_buffer(name)) for name in trace.result.assigned}
    found = {
        i.name
        for i in inputs
        if i.kind is InputKind.BUFFER and id(module.get_buffer(i.target)) in tensors
    }
    return [n for n in graph.nodes if n.op == "placeholder" and n.name in found]


def _combine_one(trace: Trace, inputs: Sequence[Input]) -> CombinedGraph:
    """Combine a single micro-batch: each result is the whole batch's already."""
    graph = trace.normalized.graph
    updates = defer_buffer_writes(graph, inputs)[0] if trace.cumulative else {}
    return combine(graph, inputs, {}, updates=updates)


def _combine_many(
    trace: Trace, inputs: Sequence[Input], request: CaptureRequest
) -> tuple[CombinedGraph, list[str]]:
    """Combine several micro-batches; also return notes on values that a numeric trial decided."""
    graph = trace.normalized.graph
    refuse_batched_writes(graph, inputs)
    updates, reductions = (
        defer_buffer_writes(graph, inputs) if request.batch_norm == "deferred" else ({}, {})
    )
    wanted = [*results_of(graph), *updates.values()]
    value = _values(trace, request.leaves)
    states, notes = decide_by_trial(graph, inputs, propagate_states(graph, inputs), wanted, value)
    states |= {n: Reduced(how) for n, how in reductions.items()}
    _mark_static(states)
    out_reduce = request.out_reduce
    return combine(graph, inputs, states, updates=updates, out_reduce=out_reduce), notes


def _mark_static(states: Mapping[fx.Node, Any]) -> None:
    """Mark ops that do not depend on the batch: all micro-batches share their random draws."""
    for node, state in states.items():
        each = state if isinstance(state, tuple) else (state,)
        if node.op == "call_function" and all(s == STATIC for s in each):
            node.meta["static"] = True


def _values(trace: Trace, leaves: Sequence[Any]) -> Callable[[Input], Tensor]:
    """Placeholder → its tensor in this model and call."""
    module, constants = trace.module, trace.normalized.constants

    def value(item: Input) -> Tensor:
        if item.kind is InputKind.PARAMETER:
            return module.get_parameter(item.target)
        if item.kind is InputKind.BUFFER:
            return module.get_buffer(item.target)
        found: Tensor = constants[item.target] if item.target else leaves[item.index]
        return found

    return value


def _result_leaves(trace: Trace, tensors: Sequence[ResultLeaf]) -> tuple[ResultLeaf, ...]:
    """All leaves of the model's result, given those that are tensors."""
    remaining = iter(tensors)
    return tuple(
        next(remaining) if isinstance(leaf, TensorSlot) else _plain_leaf(leaf)
        for leaf in trace.result.leaves
    )


def _plain_leaf(leaf: Any) -> ResultLeaf:
    """A leaf that is not a tensor: its value while tracing, or a function of sizes."""
    if not isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ResultLeaf("constant", leaf)
    if free_unbacked_symbols(leaf):
        raise CaptureError(
            "the model returns a number that depends on the values of tensors",
            found=f"a {leaf.node.pytype.__name__}",
            remedy="return the tensor itself (no .item(), no nonzero().shape)",
        )
    kind = leaf.node.pytype
    expr = full_size(leaf)
    return ResultLeaf("size", lambda sizes: kind(expr.subs(sizes)))


def _result_spec(trace: Trace) -> pytree.TreeSpec:
    assert trace.result.spec is not None
    return trace.result.spec
