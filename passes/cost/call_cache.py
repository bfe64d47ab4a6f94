"""The cost of a distinct op: computed once, shared by all equal ops.

Two ops are equal if their operator, sizes, strides, dtypes and gradients are. The layers of a model
usually repeat the same few ops.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import sympy
from torch import Tensor

from autopipe.interrupts import raise_interrupt
from autopipe.passes._torch import storage_id
from autopipe.passes.graph import symbolic_size, tensors_of
from autopipe.passes.ir import ZERO, B, GradFlow, NodeCost

from .meta_run import ATTENTION, MetaBackward, MetaRun, run_backward, run_forward
from .op_counter import PROBE_BATCHES, fit_polynomial, work_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from autopipe.passes.kernels import Capability

Flags = tuple[bool, ...]
"""One boolean per tensor of a value: whether it needs a gradient, or gets one."""


class DistinctCall:
    """One distinct op: its runs by batch size, its backwards by which results get a gradient.

    Attributes:
        node: one of the graph's nodes with this op.
        operands_need_grad: for each tensor operand, for each of its tensors.
        kernels: the compute capability of the planned CUDA device that it is costed for, or None.
        is_fused: whether it runs on fake CPU tensors, for which torch chooses fused kernels.
        memory_call: the object whose run gives the memory: this one, or for attention its fused
            variant.
        failed: whether it cannot run without memory, so that its cost is an estimate.
    """

    def __init__(
        self,
        node: fx.Node,
        operands_need_grad: tuple[Flags, ...],
        *,
        fused: bool = False,
        kernels: Capability | None = None,
    ) -> None:
        self.node = node
        self.operands_need_grad = operands_need_grad
        self.is_fused, self.kernels = fused, kernels
        self.memory_call = self
        self.failed = False
        self._runs: dict[int, MetaRun] = {}
        self._backwards: dict[tuple[int, Flags], MetaBackward] = {}
        self._costs: dict[Flags, NodeCost] = {}

    @classmethod
    def first_run(
        cls,
        node: fx.Node,
        operands_need_grad: tuple[Flags, ...],
        kernels: Capability | None = None,
    ) -> DistinctCall:
        """Run an op for the first time and note whether it can run without memory.

        It runs on meta tensors, or else on fake CPU tensors (a custom autograd.Function may create
        CPU tensors).
        """
        for fused in (False, True):
            call = cls(node, operands_need_grad, fused=fused, kernels=kernels)
            try:
                call.run(PROBE_BATCHES[0])
                if node.target in ATTENTION and kernels is None:
                    call.memory_call = cls(node, operands_need_grad, fused=True)
                    call.memory_call.run(PROBE_BATCHES[0])
                return call
            except Exception:  # an operator or a user's Function may raise anything
                call.failed = True
        return call

    def run(self, batch: int) -> MetaRun:
        """Run the op at a batch size, unless that was done."""
        if batch not in self._runs:
            raise_interrupt()
            self._runs[batch] = run_forward(
                *(self.node, batch, self.operands_need_grad),
                fused=self.is_fused,
                kernels=self.kernels,
            )
        return self._runs[batch]

    def run_backward(self, batch: int, results_get_grad: Flags) -> MetaBackward:
        """Run its backward at a batch size, once for each set of results that get a gradient."""
        key = (batch, results_get_grad)
        if key not in self._backwards:
            self._backwards[key] = run_backward(self.run(batch), results_get_grad)
        return self._backwards[key]

    def operands_get_grad(self, results_get_grad: Flags) -> Sequence[Flags]:
        """For each operand, the tensors that get a gradient from the backward."""
        if self.failed:
            return self.operands_need_grad
        return self.run_backward(PROBE_BATCHES[0], results_get_grad).operands_get_grad

    @property
    def saves_results(self) -> bool:
        """Whether its backward reads its results (intermediates of the operator do not count)."""
        return self.failed or self.memory_call.run(PROBE_BATCHES[0]).saves_results

    def grad_flow(self, results_get_grad: Flags) -> GradFlow:
        """Return the op's gradients, given which results get one."""
        try:
            self.cost(results_get_grad)
        except Exception:  # it, or its backward, fails at another batch size
            self.failed = True
        if self.failed or not any(results_get_grad):
            return GradFlow(
                self.operands_need_grad, results_get_grad, saves_results=any(results_get_grad)
            )
        run = self.memory_call.run(PROBE_BATCHES[0])
        return GradFlow(
            self.operands_need_grad,
            results_get_grad,
            saved_operands=tuple(sorted(run.saved_operands)),
            saves_results=run.saves_results or run.inner_bytes > 0,
        )

    def cost(self, results_get_grad: Flags) -> NodeCost:
        """Return the part of its cost that does not depend on other ops of the graph."""
        if results_get_grad not in self._costs:
            self._costs[results_get_grad] = _cost(self, results_get_grad)
        return self._costs[results_get_grad]


def _cost(call: DistinctCall, results_get_grad: Flags) -> NodeCost:
    node, target = call.node, call.node.target
    sources = [t for n in node.all_input_nodes for t in tensors_of(n)]
    source_storages = {storage_id(t) for t in sources}
    results = tensors_of(node)
    new = [t for t in results if storage_id(t) not in source_storages]
    is_view = not new and not target._schema.is_mutable  # type: ignore[union-attr]
    moved = sum((nbytes(t) for t in [*sources, *results]), ZERO)
    floats = [t for t in [*results, *sources] if t.is_floating_point()]
    cost = NodeCost(
        forward_bytes=ZERO if is_view else moved,
        activation_bytes=sum((nbytes(t) for t in new), ZERO),
        precision="half" if floats and floats[0].dtype.itemsize == 2 else "fp32",
        exact=not call.failed and all(map(_is_polynomial, [*sources, *results])),
    )
    if call.failed:
        return replace(cost, backward_bytes=2 * moved if any(results_get_grad) else ZERO)
    forward = fit_polynomial(lambda batch: call.run(batch).flops)
    cost = replace(cost, forward_flops=forward, kind=work_kind(node.target, forward))
    if not any(results_get_grad):
        return cost
    memory = call.memory_call
    return replace(
        cost,
        backward_flops=fit_polynomial(lambda b: call.run_backward(b, results_get_grad).flops),
        backward_bytes=fit_polynomial(
            lambda b: memory.run_backward(b, results_get_grad).moved_bytes
        ),
        saved_bytes=fit_polynomial(lambda b: memory.run(b).inner_bytes),
    )


def nbytes(tensor: Tensor) -> sympy.Expr:
    """Return the bytes of a tensor of a captured graph, as an expression in `B`."""
    return sympy.Mul(*map(symbolic_size, tensor.shape)) * tensor.dtype.itemsize


def _is_polynomial(tensor: Tensor) -> bool:
    return all(symbolic_size(s).is_polynomial(B) for s in tensor.shape)
