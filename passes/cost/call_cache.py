"""A distinct call of a captured graph: what it costs, whichever of its likes is meant.

Calls are alike if operator, sizes, strides, dtypes and gradients are: a model's layers repeat.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import sympy
from torch import Tensor

from autopipe.passes._torch import storage_id
from autopipe.passes.graph import symbolic_size, tensors_of
from autopipe.passes.ir import ZERO, B, GradFlow, NodeCost

from .meta_run import ATTENTION, MetaBackward, MetaRun, run_backward, run_forward
from .op_counter import PROBE_BATCHES, fit_polynomial, work_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

Flags = tuple[bool, ...]
"""For each leaf of a value: something about gradients."""


class DistinctCall:
    """A distinct call: its runs by batch size, its backwards by which results get a gradient."""

    def __init__(self, node: fx.Node, needs: tuple[Flags, ...], *, fused: bool = False) -> None:
        self.node = node
        self.given = needs
        self.is_fused = fused
        self.runs: dict[int, MetaRun] = {}
        self.backs: dict[tuple[int, Flags], MetaBackward] = {}
        self.costs: dict[Flags, NodeCost] = {}
        self.memory = self
        self.refused = False

    @classmethod
    def of(cls, node: fx.Node, needs: tuple[Flags, ...]) -> DistinctCall:
        """Run a call for the first time: on meta tensors, or else on fake ones of the CPU (a custom
        Function may make tensors there); note if it refuses to run without memory."""
        for fused in (False, True):
            known = cls(node, needs, fused=fused)
            try:
                known.run(PROBE_BATCHES[0])
                if node.target in ATTENTION:
                    known.memory = cls(node, needs, fused=True)
                    known.memory.run(PROBE_BATCHES[0])
                return known
            except Exception:  # whatever an operator, or a user's Function, may raise
                known.refused = True
        return known

    def run(self, batch: int) -> MetaRun:
        """The call at one batch size."""
        if batch not in self.runs:
            self.runs[batch] = run_forward(self.node, batch, self.given, fused=self.is_fused)
        return self.runs[batch]

    def back(self, batch: int, wanted: Flags) -> MetaBackward:
        """Its backward."""
        if (batch, wanted) not in self.backs:
            self.backs[batch, wanted] = run_backward(self.run(batch), wanted)
        return self.backs[batch, wanted]

    def arrives(self, wanted: Flags) -> Sequence[Flags]:
        """For each operand, the leaves that a gradient arrives at."""
        return self.given if self.refused else self.back(PROBE_BATCHES[0], wanted).arrives

    @property
    def keeps_results(self) -> bool:
        """Whether its backward reads its results (not what only it sees)."""
        return self.refused or self.memory.run(PROBE_BATCHES[0]).saved_results

    def flow(self, wanted: Flags) -> GradFlow:
        """The gradients it takes part in, if these come for its results."""
        try:
            self.cost(wanted)
        except Exception:  # another size, or its backward, refuses
            self.refused = True
        if self.refused or not any(wanted):
            return GradFlow(self.given, wanted, saves_results=any(wanted))
        memory = self.memory.run(PROBE_BATCHES[0])
        own = memory.saved_results or memory.inner_bytes > 0
        return GradFlow(self.given, wanted, tuple(sorted(memory.saved_operands)), own)

    def cost(self, wanted: Flags) -> NodeCost:
        """All of its cost but what depends on its neighbours."""
        if wanted not in self.costs:
            self.costs[wanted] = _cost(self, wanted)
        return self.costs[wanted]


def _cost(known: DistinctCall, wanted: Flags) -> NodeCost:
    node, target = known.node, known.node.target
    sources = [t for n in node.all_input_nodes for t in tensors_of(n)]
    owned = {storage_id(t) for t in sources}
    results = tensors_of(node)
    new = [t for t in results if storage_id(t) not in owned]
    is_view = not new and not target._schema.is_mutable  # type: ignore[union-attr]
    moved = sum((nbytes(t) for t in [*sources, *results]), ZERO)
    floats = [t for t in [*results, *sources] if t.is_floating_point()]
    cost = NodeCost(
        forward_bytes=ZERO if is_view else moved,
        activation_bytes=sum((nbytes(t) for t in new), ZERO),
        precision="half" if floats and floats[0].dtype.itemsize == 2 else "fp32",
        exact=not known.refused and all(map(_is_polynomial, [*sources, *results])),
    )
    if known.refused:
        return replace(cost, backward_bytes=2 * moved if any(wanted) else ZERO)
    forward = fit_polynomial(lambda batch: known.run(batch).flops)
    cost = replace(cost, forward_flops=forward, kind=work_kind(node.target, forward))
    if not any(wanted):
        return cost
    memory = known.memory
    return replace(
        cost,
        backward_flops=fit_polynomial(lambda batch: known.back(batch, wanted).flops),
        backward_bytes=fit_polynomial(lambda batch: memory.back(batch, wanted).moved_bytes),
        saved_bytes=fit_polynomial(lambda batch: memory.run(batch).inner_bytes),
    )


def nbytes(tensor: Tensor) -> sympy.Expr:
    """Bytes of a tensor of a captured graph, as an expression in `B`."""
    return sympy.Mul(*map(symbolic_size, tensor.shape)) * tensor.dtype.itemsize


def _is_polynomial(tensor: Tensor) -> bool:
    return all(symbolic_size(s).is_polynomial(B) for s in tensor.shape)
