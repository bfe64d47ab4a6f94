"""Run one op of a captured graph, and its backward, on tensors without memory.

The cost of a backward comes from running it, not from a table. The op runs on meta tensors with its
operands' sizes and strides, which require a gradient if the operands do. `torch.autograd.grad` runs
its backward. `op_counter` counts the kernels that both dispatch, and hooks record what autograd
saves.

The kernels of fused attention depend on the device. Its FLOPs are those of its plain kernels, which
run on meta tensors (two products forward, four backward; a fused backward on a GPU recomputes one
more). Its memory is that of a fused kernel, since every device has one: the CPU's is used. A plan
for a CUDA device that is not here costs CUDA's kernels, by name (`autopipe.passes.kernels`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from autopipe.passes._torch import storage_id
from autopipe.passes._torch_modes import detached_unseen, saved_tensors_seen
from autopipe.passes.graph import is_size, static_fake_mode, symbolic_size
from autopipe.passes.ir import B, GradFlow, at_batch
from autopipe.passes.kernels import call_as_cuda

from .op_counter import OpCounter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autopipe.passes.kernels import Capability

aten = torch.ops.aten

ATTENTION = (aten.scaled_dot_product_attention.default,)
"""Operators whose kernels depend on the device: their memory is that of the fused CPU kernel.

Add an operator here if its plain and fused kernels save different amounts of memory."""


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Return the argument nodes of an op that compute tensors, each once, in order."""
    return [n for n in node.all_input_nodes if not is_size(n)]


def operand_values(
    node: fx.Node, batch: int, make: Callable[[Sequence[int], Sequence[int], torch.dtype], Any]
) -> dict[fx.Node, Any]:
    """Create the values of an op's argument nodes at one batch size.

    Args:
        node: the op.
        batch: samples.
        make: shape, strides, dtype → tensor. (Kernels are chosen by strides, too.)

    Returns:
        For each argument node its value: tensors that `make` returned, or concrete numbers.
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
    """Evaluate a size, or another number computed from sizes, at one batch size."""
    if isinstance(value, torch.SymInt):
        return at_batch(symbolic_size(value), batch)
    if isinstance(value, torch.SymFloat):
        return float(symbolic_size(value).subs(B, batch))
    if isinstance(value, torch.SymBool):
        return bool(symbolic_size(value).subs(B, batch))
    return value


Edges = tuple[tuple[Any, ...], ...]
"""For each operand, for each of its tensors: its gradient edge, or None."""


@dataclass(frozen=True)
class BoundCall:
    """An op with tensors to run it on.

    Attributes:
        node: the op.
        values: the values of its argument nodes.
        operands_need_grad: for each tensor operand, for each of its tensors.
        batch: samples.
        device: where factory ops create their tensors.
    """

    node: fx.Node
    values: Mapping[fx.Node, Any]
    operands_need_grad: Sequence[Sequence[bool]]
    batch: int
    device: torch.device

    @property
    def target(self) -> Any:
        """The operator."""
        return self.node.target

    def arguments(self) -> tuple[Any, Any, dict[fx.Node, Any], Edges]:
        """Prepare the arguments for one run.

        Returns:
            args, kwargs, the operands' values, and their gradient edges. An operand that the op
            writes to is a new copy.
        """
        operands, schema = tensor_operands(self.node), self.target._schema
        marked = {
            n: _require_grad(self.values[n], flags, schema.is_mutable)
            for n, flags in zip(operands, self.operands_need_grad, strict=True)
        }
        edges = tuple(
            tuple(
                get_gradient_edge(x) if isinstance(x, Tensor) and x.requires_grad else None
                for x in pytree.tree_leaves(marked[n])
            )
            for n in operands
        )
        values = {**self.values, **marked}
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), values.__getitem__)
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: self.device, (args, kwargs))
        if not operands and any(a.name == "device" for a in schema.arguments):
            kwargs = {**kwargs, "device": self.device}
        return args, kwargs, marked, edges


def tensor_leaves(value: Any) -> tuple[Tensor | None, ...]:
    """Return the leaves of an op's result, with None for each leaf that is not a tensor."""
    return tuple(x if isinstance(x, Tensor) else None for x in pytree.tree_leaves(value))


@dataclass(frozen=True)
class MetaRun:
    """An op that has run once, with its autograd graph.

    Attributes:
        edges: gradient edges of the operands.
        results: the resulting tensors (None for a leaf that is not a tensor).
        flops: of the forward.
        saved_operands: positions of the operands whose memory autograd saved.
        saves_results: whether autograd saved the memory of a result.
        inner_bytes: other memory that autograd saved: intermediates inside the operator.
    """

    edges: Edges
    results: tuple[Tensor | None, ...]
    flops: int
    saved_operands: frozenset[int]
    saves_results: bool
    inner_bytes: int

    @property
    def results_need_grad(self) -> tuple[bool, ...]:
        """For each result: does it need a gradient?"""
        return tuple(r is not None and r.requires_grad for r in self.results)


@dataclass(frozen=True)
class MetaBackward:
    """The backward of an op.

    Attributes:
        flops: floating-point operations.
        moved_bytes: read and written.
        operands_get_grad: for each tensor operand, for each of its tensors.
    """

    flops: int
    moved_bytes: int
    operands_get_grad: tuple[tuple[bool, ...], ...]


def run_forward(
    node: fx.Node,
    batch: int,
    operands_need_grad: Sequence[Sequence[bool]],
    *,
    fused: bool = False,
    kernels: Capability | None = None,
) -> MetaRun:
    """Run an op at one batch size.

    Args:
        node: its target is an operator.
        batch: samples.
        operands_need_grad: for each tensor operand, for each of its tensors.
        fused: run on fake CPU tensors instead of meta tensors, so that fused kernels are chosen.
        kernels: the compute capability of the CUDA device whose kernels are called; None: those of
            meta tensors.

    Raises:
        Exception: any kind, from an operator that has no kernel for such tensors.
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
        values = operand_values(node, batch, empty)
        call = BoundCall(node, values, operands_need_grad, batch, device)
        args, kwargs, marked, edges = call.arguments()
        owner = {
            storage_id(x): i
            for i, n in enumerate(operands)
            for x in pytree.tree_leaves(marked[n])
            if isinstance(x, Tensor)
        }
        saved: dict[int, int] = {}  # the bytes of each memory

        def pack(x: Tensor) -> Tensor:
            saved[storage_id(x)] = x.untyped_storage().nbytes()
            # A result that saved itself would never be freed: autograd holds it, out of gc's sight.
            return detached_unseen(x)

        with saved_tensors_seen(pack), OpCounter() as counter:
            results = tensor_leaves(call_as_cuda(call.target, args, kwargs, kernels))
        created = {storage_id(x) for x in results if x is not None} - set(owner)
        inner = [n for s, n in saved.items() if s not in owner and s not in created]
        return MetaRun(
            edges,
            results,
            counter.flops,
            frozenset(owner[s] for s in saved if s in owner),
            any(s in created for s in saved),
            sum(inner),
        )


def run_backward(run: MetaRun, results_get_grad: Sequence[bool]) -> MetaBackward:
    """Run the backward of an op.

    Args:
        run: the op's forward.
        results_get_grad: for each result, whether it gets a gradient.
    """
    roots = [
        r
        for r, gets in zip(run.results, results_get_grad, strict=True)
        if gets and r is not None and r.requires_grad
    ]
    edges = [e for of in run.edges for e in of if e is not None]
    if not roots or not edges:
        return MetaBackward(0, 0, tuple(tuple(False for _ in of) for of in run.edges))
    with torch.inference_mode(False):
        with nullcontext() if roots[0].is_meta else static_fake_mode():
            tangents = [torch.empty_like(r) for r in roots]
        with OpCounter() as counter:
            found = iter(
                torch.autograd.grad(roots, edges, tangents, allow_unused=True, retain_graph=True)
            )
    gets_grad = tuple(
        tuple(e is not None and next(found) is not None for e in of) for of in run.edges
    )
    return MetaBackward(counter.flops, counter.moved_bytes, gets_grad)


def _require_grad(value: Any, needs: Sequence[bool], written: bool) -> Any:
    """Make tensors require a gradient where they need one; copy them if the op writes to them."""
    leaves, spec = pytree.tree_flatten(value)
    for x, need in zip(leaves, needs, strict=True):
        if need:
            x.requires_grad_()
    # A leaf that requires a gradient cannot be changed in place; a copy of it can.
    marked = [x.clone() if need and written else x for x, need in zip(leaves, needs, strict=True)]
    return pytree.tree_unflatten(marked, spec)


def work_key(node: fx.Node, batch: int, flow: GradFlow) -> str:
    """Describe an op as a string, equal for ops that do the same work at this batch size."""
    metadata = operand_values(
        node, batch, lambda shape, stride, dtype: f"{dtype}{list(shape)}{list(stride)}"
    )
    position = {n: i for i, n in enumerate(tensor_operands(node))}

    def word(n: fx.Node) -> str:
        return f"%{position.get(n, '')} {metadata[n]}"

    args, kwargs = fx.map_arg((node.args, node.kwargs), word)
    return f"{node.target} {args} {kwargs} {flow.operands_need_grad} {flow.results_get_grad}"
