"""nn.Module + example inputs → `Captured`: one flat graph of ATen calls, its batch symbolic.

torch.export does the tracing (non-strict). What it would do silently and wrongly is prevented
here: two arguments that are one tensor would become one input, a batch of one would be baked in,
a custom backward or a tensor hook would vanish from the gradient. The result is then put in the
form that the later passes rely on (`normalize`), and its outputs are given a rule by which
micro-batches combine (`combine`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError, InputError, UnsupportedError
from autopipe.passes._torch import free_unbacked_symbols
from autopipe.passes.batch import STATIC, Reduced, combine, follow, settle
from autopipe.passes.graph import in_batch_symbol, warn_at_user_line
from autopipe.passes.ir import SINGLE_SAMPLE, B, Captured, Input, InputKind, ResultLeaf, results_of
from autopipe.passes.ops import ctc_losses

from .buffer_assignment import kept_apart
from .buffer_mutation import check_rows, defer
from .exporting import Sizes, export
from .flat_module import Flat, Hole
from .module_state import forgotten
from .normalize import Normalized, normalize
from .patches import DataDetached, cumulative_norms, noted_hooks, off_meta
from .size_guards import branches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def capture(
    model: nn.Module | fx.GraphModule | torch.export.ExportedProgram,
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    batch_dims: Sequence[int | None],
    *,
    whole: bool = False,
    single: bool = False,
    batch_norm: str = "deferred",
    out_reduce: str | None = None,
) -> Captured:
    """Trace `model(*args, **kwargs)` once, with the batch dimension symbolic.

    Args:
        model: the model in the mode (train or eval) to capture; an ExportedProgram must have been
            exported with a dynamic batch dimension.
        leaves: the flattened ``(args, kwargs)``; what is no tensor becomes part of the graph.
        spec: structure of ``(args, kwargs)``.
        batch_dims: for each leaf the dimension that micro-batches cut, or None.
        whole: there will only ever be one micro-batch, so that nothing need be combined.
        single: the batch has one sample, and the graph is to hold for that alone.
        batch_norm: "deferred": buffers change as if the whole batch had been seen once; "micro":
            once per micro-batch.
        out_reduce: how results of one number are combined whose own rule cannot be derived.

    Returns:
        A verified `Captured`; the model's own tensors are referred to by name.

    Raises:
        CaptureError: control flow that depends on data, a batch size fixed by the model, a custom
            ``autograd.Function`` or a tensor hook (their gradients would be lost), a result that
            is no tensor and no known container.
        CouplingError: an output that no micro-batches can be combined to.
    """
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    symbolic = [None] * len(leaves) if single else batch_dims
    examples = _examples(leaves, symbolic)
    flat = Flat(module, leaves, spec)
    dims = [symbolic[i] for i in flat.tensor_positions]
    names = _names(module, leaves, spec)
    with (
        off_meta(module, examples),
        ctc_losses(),
        cumulative_norms(module) as cumulative,
        noted_hooks(module) as hooks,
        DataDetached(),
    ):

        def trace() -> tuple[Sizes, Normalized]:
            program, sizes = export(flat, examples, dims)
            return sizes, normalize(program, module, flat.prefix, names)

        sizes, traced = trace()
        assigned = flat.result.assigned
        left = forgotten(flat, traced, lambda: trace()[1], examples, dims)
    for hook in hooks:
        warn_at_user_line(
            f"a forward hook of {hook} returns nothing: if it only looks on, it has done so for the"
            " last time; what a captured model computes is not shown to it"
        )
    if left:
        warn_at_user_line(
            f"the model's forward sets the attributes {', '.join(left)}; as a pipeline it does not:"
            " they stay what they were"
        )
    result = flat.result
    assert result.spec is not None
    graph, inputs, constants = traced
    inputs = tuple(
        dataclasses.replace(
            item,
            index=flat.tensor_positions[item.index],
            batch_dim=batch_dims[flat.tensor_positions[item.index]],
            requires_grad=leaves[flat.tensor_positions[item.index]].requires_grad,
        )
        if item.kind is InputKind.INPUT
        else item
        for item in inputs
    )
    holds = SINGLE_SAMPLE
    if not single:
        _check_batch(inputs, next(iter(sizes.fixed), None))
        cut = [x.shape[d] for x, d in zip(examples, dims, strict=True) if d is not None]
        holds = branches(graph, sizes.decisions, cut[0])
    notes = list(result.notes)
    if cumulative and batch_norm == "micro":
        raise UnsupportedError(
            "a cumulative average (momentum=None) of micro-batches",
            node=cumulative[0],
            remedy='use batch_norm="deferred"',
        )
    if whole or single or batch_norm == "micro":
        kept_apart(graph, _assigned(module, assigned, graph, inputs))
    if whole or single:
        updates = defer(graph, inputs)[0] if cumulative else {}
        combined = combine(graph, inputs, {}, updates=updates)
    else:
        check_rows(graph, inputs)
        updates, stated = defer(graph, inputs) if batch_norm == "deferred" else ({}, {})
        wanted = [*results_of(graph), *updates.values()]
        states, tried = settle(
            graph, inputs, follow(graph, inputs), wanted, _values(module, constants, leaves)
        )
        notes += tried
        states |= {n: Reduced(how) for n, how in stated.items()}
        _note_static(states)
        combined = combine(graph, inputs, states, updates=updates, out_reduce=out_reduce)
    filled = iter(combined.leaves)
    captured = Captured(
        graph_module=combined.graph_module,
        inputs=inputs,
        outputs=combined.outputs,
        constants=constants,
        epilogue=combined.epilogue,
        leaves=tuple(
            next(filled) if isinstance(leaf, Hole) else _number(leaf) for leaf in result.leaves
        ),
        out_spec=result.spec,
        updates=combined.updates,
        size_guards=holds,
        notes=tuple(notes),
    )
    captured.verify()
    return captured


def _number(leaf: Any) -> ResultLeaf:
    """A result that is no tensor: what it was while tracing, or computed from the batch's size."""
    if not isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ResultLeaf("constant", leaf)
    if free_unbacked_symbols(leaf):
        raise CaptureError(
            "the model returns a number that depends on the values of tensors",
            found=f"a {leaf.node.pytype.__name__}",
            remedy="return the tensor itself (no .item(), no nonzero().shape)",
        )
    kind = leaf.node.pytype
    expr = in_batch_symbol(leaf.node.expr)
    return ResultLeaf("size", lambda batch: kind(expr.subs(B, batch)))


def _note_static(states: Mapping[fx.Node, Any]) -> None:
    """Note of the calls that do not depend on the batch that they do not: the whole batch draws
    their random numbers once, and so shall all micro-batches together."""
    for node, state in states.items():
        each = state if isinstance(state, tuple) else (state,)
        if node.op == "call_function" and all(s == STATIC for s in each):
            node.meta["static"] = True


def _assigned(
    module: nn.Module, names: Sequence[str], graph: fx.Graph, inputs: Sequence[Input]
) -> list[fx.Node]:
    """The placeholders of buffers, some of which have several names."""
    tensors = {id(module.get_buffer(name)) for name in names}
    found = {
        i.name
        for i in inputs
        if i.kind is InputKind.BUFFER and id(module.get_buffer(i.target)) in tensors
    }
    return [n for n in graph.nodes if n.op == "placeholder" and n.name in found]


def _names(module: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> list[str]:
    """What the user calls a call's tensors: ``input_ids``, ``batch_mask`` for batch["mask"]."""
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    parameters = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = []
    for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
        if not isinstance(leaf, Tensor):
            continue
        where: list[Any] = [_part(key) for key in path]
        if where[0] == 0:  # args, not kwargs
            n = where[1]
            where[1] = parameters[n] if n < len(parameters) else f"arg{n}"
        text = "_".join(map(str, where[1:]))
        names.append(re.sub(r"[^0-9a-zA-Z_]", "_", text))
    return names


def _part(key: Any) -> Any:
    """One step of the way to a leaf: a dict's key, a list's index, a field's name."""
    return next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a))


def _examples(leaves: Sequence[Any], batch_dims: Sequence[int | None]) -> list[Tensor]:
    """Tensors to trace with: one object each, never fewer than two samples."""
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


def _values(
    module: nn.Module, constants: Mapping[str, Tensor], leaves: Sequence[Any]
) -> Callable[[Input], Tensor]:
    """Placeholder → the tensor that it stands for in this model and call."""

    def value(item: Input) -> Tensor:
        if item.kind is InputKind.PARAMETER:
            return module.get_parameter(item.target)
        if item.kind is InputKind.BUFFER:
            return module.get_buffer(item.target)
        found: Tensor = constants[item.target] if item.target else leaves[item.index]
        return found

    return value


def _check_batch(inputs: Sequence[Input], fixed_at: str | None) -> None:
    for item in inputs:
        if item.kind is not InputKind.INPUT or item.batch_dim is None:
            continue
        size = item.spec.shape[item.batch_dim]
        if not size.free_symbols:
            raise CaptureError(
                "the model fixes the size of its batch dimension",
                node=item.name,
                source=fixed_at,
                expected=f"any size in dimension {item.batch_dim}",
                found=f"always {size}",
                remedy="take sizes from x.shape, not from len(x), and do not go through the batch"
                " sample by sample (for, list, unbind); if this input is not batched, say so with"
                " in_dims (None for it); an ExportedProgram must be exported with a dynamic batch"
                " dimension",
            )
        if not size.is_Symbol:
            raise UnsupportedError(
                "the model allows only some batch sizes",
                node=item.name,
                found=f"a batch of {size}",
            )
