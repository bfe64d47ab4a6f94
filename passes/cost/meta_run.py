"""One call of a captured graph, run on tensors without memory: what it and its backward do.

Autograd itself says what a backward is. The call runs on meta tensors of its operands' sizes and
strides, those marked that need a gradient; `torch.autograd.grad` runs its backward; what both
dispatch is counted (`meter`). What autograd saves is seen by its hooks.

Fused attention differs from device to device. Its FLOPs are those of its plain kernels, as a meta
tensor runs them (two products forward, four backward; a fused backward on a GPU repeats one more).
Its memory is that of a fused kernel, since all devices have one: it is read off the CPU's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils import _pytree as pytree

from autopipe.passes._torch import storage_id
from autopipe.passes.graph import is_size, static_fake_mode, symbolic_size
from autopipe.passes.ir import B, GradFlow, at_batch

from .op_counter import OpCounter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

aten = torch.ops.aten

ATTENTION = (aten.scaled_dot_product_attention.default,)
"""Operators whose kernels depend on the device."""


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that give a call its tensors, each once, in order."""
    return [n for n in node.all_input_nodes if not is_size(n)]


def operand_values(
    node: fx.Node, batch: int, make: Callable[[Sequence[int], Sequence[int], torch.dtype], Any]
) -> dict[fx.Node, Any]:
    """What a call's argument nodes make, at one batch size.

    Args:
        node: the call.
        batch: samples.
        make: shape, strides and dtype → tensor. (By strides kernels are chosen and copies made.)
    """

    def concrete(value: Any) -> Any:
        if isinstance(value, Tensor):
            shape = [at_batch(symbolic_size(s), batch) for s in value.shape]
            return make(
                shape, [at_batch(symbolic_size(s), batch) for s in value.stride()], value.dtype
            )
        return concrete_number(value, batch)

    return {n: pytree.tree_map(concrete, n.meta["val"]) for n in node.all_input_nodes}


def concrete_number(value: Any, batch: int) -> Any:
    """A size, or another number computed from sizes, at one batch size."""
    if isinstance(value, torch.SymInt):
        return at_batch(symbolic_size(value), batch)
    if isinstance(value, torch.SymFloat):
        return float(symbolic_size(value).subs(B, batch))
    if isinstance(value, torch.SymBool):
        return bool(symbolic_size(value).subs(B, batch))
    return value


Edges = tuple[tuple[Any, ...], ...]
"""For each operand, for each of its tensors: where its gradient arrives, or None."""


@dataclass(frozen=True)
class BoundCall:
    """A call with tensors to run it on.

    Attributes:
        node: the call.
        values: what its argument nodes make.
        needs: for each operand, for each of its tensors: does it need a gradient?
        batch: samples.
        device: where factories make their tensors.
    """

    node: fx.Node
    values: Mapping[fx.Node, Any]
    needs: Sequence[Sequence[bool]]
    batch: int
    device: torch.device

    @property
    def target(self) -> Any:
        """The operator."""
        return self.node.target

    def arguments(self) -> tuple[Any, Any, dict[fx.Node, Any], Edges]:
        """args, kwargs; the operands' values; their edges. What is written to is a fresh copy."""
        operands, schema = tensor_operands(self.node), self.target._schema
        marked = {
            n: _marked(self.values[n], flags, schema.is_mutable)
            for n, flags in zip(operands, self.needs, strict=True)
        }
        edges = tuple(
            tuple(
                get_gradient_edge(x) if isinstance(x, Tensor) and x.requires_grad else None
                for x in pytree.tree_leaves(marked[n])
            )
            for n in operands
        )
        known = {**self.values, **marked}
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), known.__getitem__)
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: self.device, (args, kwargs))
        if not operands and any(a.name == "device" for a in schema.arguments):
            kwargs = {**kwargs, "device": self.device}
        return args, kwargs, marked, edges


def tensor_leaves(value: Any) -> tuple[Tensor | None, ...]:
    """The leaves of what a call gave back, None for what is no tensor."""
    return tuple(x if isinstance(x, Tensor) else None for x in pytree.tree_leaves(value))


@dataclass(frozen=True)
class MetaRun:
    """A call that has run once, its autograd graph kept.

    Attributes:
        edges: where the operands' gradients arrive.
        results: the tensors that came out (None for what is no tensor).
        flops: of the forward.
        saved_operands: positions of the operands whose memory autograd saved.
        saved_results: whether it saved the memory of a result.
        inner_bytes: what it saved besides: memory that nobody else sees.
    """

    edges: Edges
    results: tuple[Tensor | None, ...]
    flops: int
    saved_operands: frozenset[int]
    saved_results: bool
    inner_bytes: int

    @property
    def flags(self) -> tuple[bool, ...]:
        """For each result: does it need a gradient?"""
        return tuple(r is not None and r.requires_grad for r in self.results)


@dataclass(frozen=True)
class MetaBackward:
    """A call's backward: its cost, and for each operand and tensor whether a gradient arrives."""

    flops: int
    moved_bytes: int
    arrives: tuple[tuple[bool, ...], ...]


def run_forward(
    node: fx.Node, batch: int, needs: Sequence[Sequence[bool]], *, fused: bool = False
) -> MetaRun:
    """Run a call at one batch size.

    Args:
        node: its target is an operator.
        batch: samples.
        needs: for each operand, for each of its tensors: does it need a gradient?
        fused: on fake CPU tensors instead of meta tensors, so that fused kernels are chosen.

    Raises:
        Whatever the operator does that has no kernel for meta tensors.
    """
    device = torch.device("cpu" if fused else "meta")

    def empty(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        static_fake_mode() if fused else nullcontext(),
    ):
        operands = tensor_operands(node)
        ready = BoundCall(node, operand_values(node, batch, empty), needs, batch, device)
        args, kwargs, marked, edges = ready.arguments()
        owner = {
            storage_id(x): i
            for i, n in enumerate(operands)
            for x in pytree.tree_leaves(marked[n])
            if isinstance(x, Tensor)
        }
        kept: list[Tensor] = []

        def pack(x: Tensor) -> Tensor:
            kept.append(x)
            return x

        with saved_tensors_hooks(pack, lambda x: x), OpCounter() as meter:
            results = tensor_leaves(ready.target(*args, **kwargs))
        made = {storage_id(x) for x in results if x is not None} - set(owner)
        inner = {
            s: x.untyped_storage().nbytes()
            for x in kept
            if (s := storage_id(x)) not in owner and s not in made
        }
        return MetaRun(
            edges,
            results,
            meter.flops,
            frozenset(owner[s] for x in kept if (s := storage_id(x)) in owner),
            any(storage_id(x) in made for x in kept),
            sum(inner.values()),
        )


def run_backward(done: MetaRun, wanted: Sequence[bool]) -> MetaBackward:
    """Run the backward of a call.

    Args:
        done: the call.
        wanted: for each result: will a gradient come for it?
    """
    roots = [
        r
        for r, w in zip(done.results, wanted, strict=True)
        if w and r is not None and r.requires_grad
    ]
    edges = [e for of in done.edges for e in of if e is not None]
    if not roots or not edges:
        return MetaBackward(0, 0, tuple(tuple(False for _ in of) for of in done.edges))
    with torch.inference_mode(False):
        with nullcontext() if roots[0].is_meta else static_fake_mode():
            tangents = [torch.empty_like(r) for r in roots]
        with OpCounter() as meter:
            found = iter(
                torch.autograd.grad(roots, edges, tangents, allow_unused=True, retain_graph=True)
            )
    arrives = tuple(
        tuple(e is not None and next(found) is not None for e in of) for of in done.edges
    )
    return MetaBackward(meter.flops, meter.moved_bytes, arrives)


def _marked(value: Any, needs: Sequence[bool], written: bool) -> Any:
    """Tensors that need a gradient where they should, and that may be written to."""
    leaves, spec = pytree.tree_flatten(value)
    for x, need in zip(leaves, needs, strict=True):
        if need:
            x.requires_grad_()
    # A leaf cannot be changed in place, its copy can.
    marked = [x.clone() if need and written else x for x, need in zip(leaves, needs, strict=True)]
    return pytree.tree_unflatten(marked, spec)


def work_key(node: fx.Node, batch: int, flow: GradFlow) -> str:
    """A call in words: equal for calls that do the same work at this batch size."""
    looks = operand_values(node, batch, lambda *look: f"{look[2]}{list(look[0])}{list(look[1])}")
    position = {n: i for i, n in enumerate(tensor_operands(node))}

    def word(n: fx.Node) -> str:
        return f"%{position.get(n, '')} {looks[n]}"

    args, kwargs = fx.map_arg((node.args, node.kwargs), word)
    return f"{node.target} {args} {kwargs} {flow.operands_need_grad} {flow.results_get_grad}"
