"""`Captured` and `Annotated`: the whole model as one graph, then with the cost of every op."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import sympy
from torch import Tensor, fx

from autopipe.errors import printable, require
from autopipe.passes.devices import KINDS, PRECISIONS

from .values import (
    ANY_BATCH_SIZE,
    ANY_NUMBER,
    B,
    Input,
    InputKind,
    Length,
    NumberGuards,
    Output,
    ResultLeaf,
    SizeGuards,
    Sizes,
    results_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.utils._pytree import TreeSpec


class PythonReads(Protocol):
    """The Python values that a model's forward read while it was captured."""

    @property
    def names(self) -> frozenset[str] | None:
        """All names by which it can have read attributes; None: unknown."""

    def changed(self, leaves: Sequence[Any]) -> str | None:
        """Return the name of a value that has changed since, or None.

        Args:
            leaves: the flattened arguments of the call that asks.
        """


class _NothingRead:
    names: frozenset[str] | None = None

    def changed(self, leaves: Sequence[Any]) -> str | None:
        return None


NOTHING_READ = _NothingRead()


@dataclass(frozen=True, eq=False)
class Captured:
    """The whole model as one flat graph of ATen ops.

    Attributes:
        graph_module: placeholders in the order of `inputs`, returns a tuple in the order of
            `outputs`.
        inputs: parameters, buffers, constants and the tensors of a call of the model.
        outputs: what each micro-batch returns.
        constants: tensors of the model that are neither parameters nor buffers, by key.
        epilogue: graph from the combined outputs to the final values, run once per step on the
            whole batch. Its placeholders are named after the outputs, ``batch_size``, lengths, and
            buffers (their values before the call). None if the combined outputs are final.
        leaves: how the final values fill the model's result.
        out_spec: the structure of the result.
        updates: (buffer, index of its value after the call among the final values).
        size_guards: the sizes that the graph is valid for.
        number_guards: the numbers that the graph is valid for, where they are inputs.
        lengths: the sizes besides the batch that may change from call to call.
        derived_sizes: (position of a leaf, dimension, size) for sizes computed from others.
        reads: the Python values that the graph is valid for.
        notes: remarks of the capture pass for the user.
        original_positions: for each node its position before ops were reordered; empty if they were
            not. Random draws are keyed by it.
        functions: what the graph's calls of custom autograd.Functions need; they run for as long
            as this is kept.
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
    number_guards: NumberGuards = ANY_NUMBER
    lengths: tuple[Length, ...] = ()
    derived_sizes: tuple[tuple[int, int, sympy.Expr], ...] = ()
    reads: PythonReads = NOTHING_READ
    notes: tuple[str, ...] = ()
    original_positions: tuple[int, ...] = ()
    functions: Mapping[int, object] = field(default_factory=dict)

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
                "a captured graph may contain only placeholders, calls and the output",
                node=node.name,
                found=node.op,
            )
            require(
                "val" in node.meta or node.op == "output", "a node without metadata", node=node.name
            )
        for item in self.inputs:
            require(
                item.kind is not InputKind.CONSTANT or item.target in self.constants,
                "a constant without a value",
                node=item.name,
            )

    def sizes(self, leaves: Sequence[Any], batch: int) -> Sizes | None:
        """Return a call's sizes; None if inputs differ that have the same size in the graph.

        Args:
            leaves: the call's flattened inputs.
            batch: its number of samples.
        """
        sizes: dict[Any, int] = {B: batch}
        for length in self.lengths:
            found = length.read(leaves)
            if found is None:
                return None
            sizes[length.name] = found
        derived = ((leaves[n].shape[d], size.subs(sizes)) for n, d, size in self.derived_sizes)
        return sizes if all(found == size for found, size in derived) else None

    def original_position(self, position: int) -> int:
        """Return the position that the node at `position` had when the graph was captured."""
        return self.original_positions[position] if self.original_positions else position

    def call_index(self, position: int) -> int:
        """Return which call of the captured graph the node at `position` is, from 0 on.

        Random draws are keyed by it: it stays the same if a loss with inputs of its own is captured
        with the model.
        """
        return self.original_position(position) - len(self.inputs)

    def tensor_of(self, model: nn.Module, item: Input) -> Tensor:
        """Return the parameter, buffer or constant of `model` that a placeholder stands for."""
        if item.kind is InputKind.CONSTANT:
            return self.constants[item.target]
        if item.kind is InputKind.PARAMETER:
            return model.get_parameter(item.target)
        return model.get_buffer(item.target)

    def __str__(self) -> str:
        lines = ["captured: " + self.graph_module.print_readable(print_output=False)]
        lines += [f"  {o.spec}  combined by {o.combine}" for o in self.outputs]
        if self.epilogue is not None:
            lines.append("epilogue: " + self.epilogue.print_readable(print_output=False))
        return printable("\n".join(lines), lines=True)


ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class NodeCost:
    """The cost of one node, as expressions in `B`.

    Attributes:
        forward_flops: floating-point operations of the forward (multiply and add count as two).
        forward_bytes: bytes read plus bytes written by the forward: every argument, every result.
        activation_bytes: bytes of memory allocated for its result (0 for a view).
        backward_flops: of what autograd runs for the operands that need a gradient.
        backward_bytes: bytes read plus bytes written by the backward, kernel by kernel; includes
            the sums of gradients of a value that is used several times.
        saved_bytes: the part of the memory allocated by this op that autograd saves for the
            backward of this or any other op; includes memory inside a composite operator.
        kind: kind of work, which determines the fraction of a device's peak that it reaches: one
            of `autopipe.passes.devices.KINDS`.
        precision: "half" for elements of two bytes, else "fp32".
        exact: False if its kernels cannot run without memory (then the backward is estimated as
            twice the forward), or if a size is not a polynomial in `B` (then the expressions
            interpolate the batch sizes at which it was counted).
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
        """FLOPs of one more forward, if rematerialization recomputes it."""
        return self.forward_flops

    @property
    def expressions(self) -> dict[str, sympy.Expr]:
        """The fields that depend on the batch size, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: e for n, e in found.items() if isinstance(e, sympy.Expr)}


@dataclass(frozen=True)
class GradFlow:
    """Which operands and results of one op have gradients.

    Attributes:
        operands_need_grad: for each tensor operand (a node), for each of its tensors: whether it
            needs a gradient.
        results_get_grad: for each result, whether a gradient arrives for it.
        saved_operands: positions of the operands that the op's backward reads.
        saves_results: whether the op's backward reads its own results or intermediates.
    """

    operands_need_grad: tuple[tuple[bool, ...], ...]
    results_get_grad: tuple[bool, ...]
    saved_operands: tuple[int, ...] = ()
    saves_results: bool = False


@dataclass(frozen=True, eq=False)
class Annotated:
    """A captured graph with the cost of every op.

    Attributes:
        captured: the graph.
        costs: by the name of the node.
        flows: which operands and results of each op have gradients, by the name of the node; not
            for sizes or Python functions.
    """

    captured: Captured
    costs: Mapping[str, NodeCost]
    flows: Mapping[str, GradFlow] = field(default_factory=dict)

    def verify(self) -> None:
        for node in self.captured.graph_module.graph.nodes:
            if node.op == "call_function":
                require(node.name in self.costs, "a node without a cost", node=node.name)
        for name in self.flows:
            require(name in self.costs, "gradient flow of a node without a cost", node=name)
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
                    "a cost may depend only on the batch size",
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
