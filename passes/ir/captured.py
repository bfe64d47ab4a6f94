"""The program between two passes: what each pass is given and what it must give back.

    Captured   one forward graph of the whole model, its batch dimension symbolic
    Annotated  the same, with costs on every node
    Split      K stage graphs and the values that cross between them (cut in space)
    Phased     each stage's joint forward+backward graph, cut into F R B W (cut in time)

The first two, of the whole model, are here, the other two in `staged`. (`Scheduled` and
`Generated`, which hold no graphs, stand beside the passes that make them.)

All are frozen. Sizes are sympy expressions in the batch size `B`; facts are fields with units in
their names. `verify()` raises `VerifyError` on a program that breaks the rules of its level, and
`str()` prints it for a person.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx

from autopipe.errors import require
from autopipe.passes.devices import KINDS, PRECISIONS

from .values import (
    ANY_BATCH_SIZE,
    B,
    Input,
    InputKind,
    Output,
    ResultLeaf,
    SizeGuards,
    TensorSpec,
    at_batch,
    results_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn
    from torch.utils._pytree import TreeSpec

__all__ = [
    "Annotated",
    "B",
    "Captured",
    "GradFlow",
    "Input",
    "InputKind",
    "NodeCost",
    "Output",
    "ResultLeaf",
    "TensorSpec",
    "at_batch",
    "require",
    "results_of",
]


@dataclass(frozen=True, eq=False)
class Captured:
    """The whole model as one flat graph of ATen calls.

    Attributes:
        graph_module: placeholders in the order of `inputs`, a tuple in the order of `outputs`.
        inputs: parameters, buffers, constants and the call's tensors.
        outputs: what each micro-batch yields.
        constants: tensors that the model holds outside parameters and buffers.
        epilogue: graph to the final values, run once a step on the whole batch; its placeholders
            are named after the outputs, ``batch_size``, and buffers as they were before the call.
            None where the combined outputs are the final values.
        leaves: how the final values fill the model's result.
        out_spec: the result's structure.
        updates: (buffer, index of its value after the call among the final values).
        size_guards: the batch sizes that the graph is valid for.
        notes: what capture did that a reader should know.
        original_positions: for each node its position before the calls were reordered; empty if
            they were not. Random draws are keyed by it.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    constants: Mapping[str, Tensor]
    epilogue: fx.GraphModule | None
    leaves: tuple[ResultLeaf, ...]
    out_spec: TreeSpec
    updates: tuple[tuple[str, int], ...] = ()
    size_guards: SizeGuards = ANY_BATCH_SIZE
    notes: tuple[str, ...] = ()
    original_positions: tuple[int, ...] = ()

    def verify(self) -> None:
        graph = self.graph_module.graph
        graph.lint()
        require(
            not self.original_positions
            or sorted(self.original_positions) == list(range(len(graph.nodes))),
            "the original positions are not a permutation of the nodes",
            found=str(self.original_positions),
        )
        placeholders = [n.name for n in graph.nodes if n.op == "placeholder"]
        require(
            placeholders == [i.name for i in self.inputs],
            "placeholders and inputs differ",
            expected=str([i.name for i in self.inputs]),
            found=str(placeholders),
        )
        returned = [n.name for n in results_of(graph)]
        require(
            returned == [o.name for o in self.outputs],
            "the graph's results and outputs differ",
            expected=str([o.name for o in self.outputs]),
            found=str(returned),
        )
        for output in self.outputs:
            output.verify()
        for node in graph.nodes:
            require(
                node.op in ("placeholder", "call_function", "output"),
                "only plain calls stand in a captured graph",
                node=node.name,
                found=node.op,
            )
            require("val" in node.meta or node.op == "output", "no looks known", node=node.name)
        for item in self.inputs:
            require(
                item.kind is not InputKind.CONSTANT or item.target in self.constants,
                "a constant without a value",
                node=item.name,
            )

    def original_position(self, position: int) -> int:
        """Return where the node at a position was when the graph was captured."""
        return self.original_positions[position] if self.original_positions else position

    def tensor_of(self, model: nn.Module, item: Input) -> Tensor:
        """Return the parameter, buffer or constant of `model` that a placeholder stands for."""
        if item.kind is InputKind.CONSTANT:
            return self.constants[item.target]
        if item.kind is InputKind.PARAMETER:
            return model.get_parameter(item.target)
        return model.get_buffer(item.target)

    def finish(
        self, combined: Sequence[Tensor], batch: int, buffer: Callable[[str], Tensor]
    ) -> Sequence[Tensor]:
        """The final values.

        Args:
            combined: one value per output.
            batch: number of samples in the whole batch.
            buffer: a buffer of the model by its qualified name.
        """
        if self.epilogue is None:
            return combined
        given: dict[str, Any] = {o.name: v for o, v in zip(self.outputs, combined, strict=True)}
        given["batch_size"] = batch
        targets = {i.name: i.target for i in self.inputs if i.kind is InputKind.BUFFER}
        names = [str(n.target) for n in self.epilogue.graph.nodes if n.op == "placeholder"]
        arguments = [given[n] if n in given else buffer(targets[n]) for n in names]
        if any("autocast" in n.meta for n in self.epilogue.graph.nodes):
            found: Sequence[Tensor] = _Regions(self.epilogue).run(*arguments)
            return found
        values: Sequence[Tensor] = self.epilogue(*arguments)
        return values

    def __str__(self) -> str:
        lines = ["captured: " + self.graph_module.print_readable(print_output=False)]
        lines += [f"  {o.spec}  combined by {o.combine}" for o in self.outputs]
        if self.epilogue is not None:
            lines.append("epilogue: " + self.epilogue.print_readable(print_output=False))
        return "\n".join(lines)


class _Regions(fx.Interpreter):
    """Runs each call in the autocast region that it was captured in."""

    def run_node(self, n: fx.Node) -> Any:
        if "autocast" not in n.meta:
            return super().run_node(n)
        _, dtype, enabled, _ = n.meta["autocast"]
        tensors = [self.env[a] for a in n.all_input_nodes]
        device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            return super().run_node(n)


ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class NodeCost:
    """What one node costs, as expressions in `B`.

    forward_flops: floating-point operations of the forward (multiply and add counted as two).
    forward_bytes: bytes read plus bytes written by the forward: every argument and every result.
    activation_bytes: bytes of new memory that its result takes (0 for a view).
    backward_flops: of what autograd runs for those operands that need a gradient.
    backward_bytes: bytes read plus bytes written by the backward, kernel by kernel, the sums of
        gradients of a value that is used several times included.
    saved_bytes: of the memory that the call makes, what autograd keeps for the backward, whichever
        call saves it; memory inside a composite operator counts, a shared one once.
    kind: which fraction of a device's peak it reaches: one of `autopipe.passes.devices.KINDS`.
    precision: "half" for elements of two bytes, else "fp32".
    exact: False where its kernels could not be run without memory, or a size is no polynomial in
        `B`: then the backward is taken for twice the forward, or the expressions for those of the
        batch sizes at which they were read.
    """

    forward_flops: sympy.Expr = ZERO
    forward_bytes: sympy.Expr = ZERO
    activation_bytes: sympy.Expr = ZERO
    backward_flops: sympy.Expr = ZERO
    backward_bytes: sympy.Expr = ZERO
    saved_bytes: sympy.Expr = ZERO
    kind: str = "memory"
    precision: str = "fp32"
    exact: bool = True

    @property
    def recompute_flops(self) -> sympy.Expr:
        """Of one more forward, where rematerialization runs it again."""
        return self.forward_flops

    @property
    def expressions(self) -> dict[str, sympy.Expr]:
        """The facts that depend on the batch size, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: e for n, e in found.items() if isinstance(e, sympy.Expr)}


@dataclass(frozen=True)
class GradFlow:
    """The gradients that one call takes part in.

    Attributes:
        operands_need_grad: for each tensor operand (a node), for each of its tensors: does it need
            a gradient?
        results_get_grad: for each result: does a gradient arrive for it?
        saved_operands: positions of the operands that the call's backward reads again.
        saves_results: whether its backward reads the call's own results or intermediates.
    """

    operands_need_grad: tuple[tuple[bool, ...], ...]
    results_get_grad: tuple[bool, ...]
    saved_operands: tuple[int, ...] = ()
    saves_results: bool = False


@dataclass(frozen=True, eq=False)
class Annotated:
    """A captured graph with a cost on every computing node (key: the node's name).

    flows: for the calls that were run to be costed (not sizes, not Python's own functions).
    """

    captured: Captured
    costs: Mapping[str, NodeCost]
    flows: Mapping[str, GradFlow] = field(default_factory=dict)

    def verify(self) -> None:
        for node in self.captured.graph_module.graph.nodes:
            if node.op == "call_function":
                require(node.name in self.costs, "a node without a cost", node=node.name)
        for name in self.flows:
            require(name in self.costs, "gradients of a node without a cost", node=name)
        for name, cost in self.costs.items():
            require(cost.kind in KINDS, "unknown kind of work", node=name, found=cost.kind)
            require(
                cost.precision in PRECISIONS,
                "unknown precision",
                node=name,
                found=cost.precision,
            )
            for fact, expr in cost.expressions.items():
                require(
                    expr.free_symbols <= {B},
                    "a cost may depend on the batch size only",
                    node=name,
                    found=f"{fact} {expr}",
                )

    def __str__(self) -> str:
        rows = [
            f"{n:40} {c.forward_flops!s:>28} flops {c.backward_flops!s:>28} backward"
            f" {c.forward_bytes!s:>24} B moved {c.saved_bytes!s:>20} B saved"
            + ("" if c.exact else "  (estimated)")
            for n, c in self.costs.items()
        ]
        return "\n".join(["annotated:", *rows])
