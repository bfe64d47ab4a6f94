"""Trace a model: call it once on example tensors, through its front end."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError, InputError
from autopipe.passes.graph import line_of, warn_at_user_line
from autopipe.passes.ir import NumberGuards
from autopipe.passes.ops import exportable_ctc_loss
from autopipe.passes.python_state import refuse_leftovers, shared

from .containers import take_apart
from .flat_module import FlatModel, ForwardResult
from .frontends import argument_names, as_module, frontend_of
from .hidden_state import check_clock, check_hidden_state
from .patches import (
    find_nested_encoders,
    find_observer_hooks,
    gather_on_one_device,
    trace_cumulative_norms,
    unchecked_distributions,
)
from .symbolic_dims import NamedLengths, SymbolicDims

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .normalize import Normalized
    from .request import CaptureRequest
    from .size_uses import SizeUses


class Trace(NamedTuple):
    """A traced model.

    Attributes:
        module: the module that was traced.
        normalized: its graph.
        sizes: how the model's code used symbolic sizes.
        result: how its results fill the structure that it returns; the buffers that it assigns.
        cumulative: paths of batch norms with a cumulative average (momentum None).
        positions: for each input of the graph its position among the call's leaves.
        batch: number of samples that it was traced with; None: the batch dimension is not symbolic.
        lengths: the other symbolic sizes, with their places among the call's leaves.
        numbers: for which numbers, among those that are inputs, the trace holds.
    """

    module: nn.Module
    normalized: Normalized
    sizes: SizeUses
    result: ForwardResult
    cumulative: Sequence[str]
    positions: Sequence[int]
    batch: int | None
    lengths: NamedLengths
    numbers: NumberGuards


def trace_model(request: CaptureRequest) -> Trace:
    """Trace a model once, and again if it sets attributes of its modules.

    It warns about forward hooks that return nothing, and about attributes that the forward sets.

    Args:
        request: the model, its example inputs and their batch dimensions.

    Returns:
        The `Trace`.

    Raises:
        InputError: the batch holds no sample.
        CaptureError: the model cannot be captured faithfully.
    """
    module = as_module(request.model)
    trace = frontend_of(module).trace
    examples = example_tensors(request.leaves, request.symbolic_batch_dims)
    flat = FlatModel(module, request.leaves, request.spec, request.numbers, request.loss_fn)
    positions = flat.tensor_positions
    batch_dims = [request.symbolic_batch_dims[i] for i in positions]
    dims = [
        SymbolicDims(d, request.lengths_of(i)) for i, d in zip(positions, batch_dims, strict=True)
    ]
    all_names = leaf_names(module, request.leaves, request.spec)
    names = [all_names[i] for i in positions]
    with ExitStack() as stack:
        stack.enter_context(gather_on_one_device(module, examples))
        stack.enter_context(exportable_ctc_loss())
        cumulative = stack.enter_context(trace_cumulative_norms(module))
        hooks = stack.enter_context(find_observer_hooks(module))
        stack.enter_context(unchecked_distributions())
        encoders = stack.enter_context(find_nested_encoders(module))
        normalized, sizes = trace(flat, examples, dims, names)
        numbers = flat.numbers.guards
        refuse_leftovers(flat.result.created)
        if flat.tells_objects_apart and (same := _same_objects(request)):
            flat.share(same)
            normalized, sizes = trace(flat, examples, dims, names)
        remarks = tuple(dict.fromkeys((*flat.result.remarks, *sizes.checks)))
        result = replace(flat.result, remarks=remarks)  # later calls of `flat` replace it
        if result.clocks:
            check_clock(normalized, trace(flat, examples, dims, names)[0], result.clocks)
        attributes = check_hidden_state(
            flat, normalized, lambda: trace(flat, examples, dims, names)[0], examples, batch_dims
        )
    if result.reads is not None:  # now nothing of torch is replaced any more
        result.reads.of_call(request.leaves, names, line_of(module.forward))
    for path in encoders:
        warn_at_user_line(
            f"nn.TransformerEncoder ({path}): in evaluation without gradients, eager torch returns"
            " zeros at positions that are padded at the end; a pipeline returns there what it does"
            " with gradients. enable_nested_tensor=False makes both the same"
        )
    _warn(hooks, attributes, result)
    batches = (x.shape[d] for x, d in zip(examples, batch_dims, strict=True) if d is not None)
    batch = next(batches, None)
    lengths = _of_leaves(sizes.named, positions)
    return Trace(module, normalized, sizes, result, cumulative, positions, batch, lengths, numbers)


def _of_leaves(named: NamedLengths, positions: Sequence[int]) -> NamedLengths:
    """The same lengths, with their places among all leaves instead of among the tensors."""
    return NamedLengths(
        tuple(
            replace(x, places=tuple((positions[n], d) for n, d in x.places)) for x in named.lengths
        ),
        tuple((positions[n], d, size) for n, d, size in named.derived),
    )


def _same_objects(request: CaptureRequest) -> dict[int, int]:
    """Tensors of the call that are the same object: position → position of the first.

    Raises:
        CaptureError: they are batched in different dimensions, so that a trace needs two.
    """
    tensors = [
        (x, d)
        for x, d in zip(request.leaves, request.symbolic_batch_dims, strict=True)
        if isinstance(x, Tensor)
    ]
    same = shared([x for x, _ in tensors])
    if any(tensors[n][1] != tensors[first][1] for n, first in same.items()):
        raise CaptureError(
            "the forward may ask whether two arguments are one object; they are, but they are not"
            " split into micro-batches alike",
            remedy="pass a copy: tensor.clone()",
        )
    return same


def _warn(hooks: Sequence[str], attributes: Sequence[str], result: ForwardResult) -> None:
    for hook in hooks:
        warn_at_user_line(
            f"a forward hook of {hook} returns nothing: if it only observes, it has run for the"
            " last time; it is not shown what a captured model computes"
        )
    if attributes:
        warn_at_user_line(
            f"the model's forward sets {', '.join(attributes)}; the pipeline does not: they keep"
            " their values"
        )
    for remark in result.remarks:
        warn_at_user_line(f"the model's forward {remark}")
    if result.reads is not None and (large := result.reads.not_compared):
        warn_at_user_line(
            f"the model's forward reads {', '.join(large)}, too large to be compared in every call:"
            " the pipeline goes on with the contents of now; keep large data in a buffer"
            " (register_buffer)"
        )


def example_tensors(leaves: Sequence[Any], batch_dims: Sequence[int | None]) -> list[Tensor]:
    """Tensors to trace with: distinct objects, with at least two samples.

    Otherwise two arguments that are the same tensor would become one input, and a batch size of one
    would become a constant.

    Args:
        leaves: the flattened call.
        batch_dims: for each leaf its batch dimension, or None.

    Returns:
        One for each tensor among the leaves.

    Raises:
        InputError: the batch holds no sample.
    """
    examples = []
    for leaf, dim in zip(leaves, batch_dims, strict=True):
        if not isinstance(leaf, Tensor):
            continue
        example = leaf.detach().clone(memory_format=torch.contiguous_format)
        if dim is not None and example.shape[dim] < 2:
            if example.shape[dim] == 0:
                raise InputError("a batch without samples", found=f"shape {tuple(leaf.shape)}")
            example = torch.cat([example, example], dim)
        examples.append(example.requires_grad_(leaf.requires_grad))
    return examples


def leaf_names(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> list[str]:
    """Names of a call's leaves after its arguments: ``input_ids``, ``batch_mask``.

    Args:
        model: for the names of its positional arguments.
        leaves: the flattened call.
        spec: its structure.

    Returns:
        One for each leaf; ``batch_mask`` stands for ``batch["mask"]``.
    """
    marks = [torch.empty(0) for _ in leaves]  # tensors, so that objects are taken apart again
    args, kwargs = pytree.tree_unflatten(marks, spec)
    parameters = argument_names(model)
    names = []
    for path, _ in pytree.tree_leaves_with_path(take_apart((args, kwargs))):
        parts: list[Any] = [_key(entry) for entry in path]
        if parts[0] == 0:  # args, not kwargs
            n = parts[1]
            parts[1] = parameters[n] if n < len(parameters) else f"arg{n}"
        text = "_".join(map(str, parts[1:]))
        names.append(re.sub(r"[^0-9a-zA-Z_]", "_", text))
    return names


def _key(entry: Any) -> Any:
    """One entry of a leaf's path: a dict's key, a list's index or a field's name."""
    return next(getattr(entry, a) for a in ("key", "idx", "name") if hasattr(entry, a))
