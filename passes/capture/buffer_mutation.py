"""Turn in-place writes to buffers into results, so that buffers are written once a step.

An in-place op on a buffer would run once per micro-batch: BatchNorm's running statistics would take
M small steps, a counter would count micro-batches. Here such ops are rewritten so that buffers are
only read and their new values are results of the graph. Reductions over the batch are combined over
the micro-batches, and each buffer is written once a step (see `autopipe.passes.batch`).

Nodes are visited in program order. An op that writes is replaced by its out-of-place variant. If it
wrote to a view, the view's new value is put into a copy of the viewed tensor. Later users of the
buffer, or of a view of it, read the new value, or a new view of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx

from autopipe.errors import UnsupportedError
from autopipe.passes._torch import storage_id, storage_id_of
from autopipe.passes.graph import (
    HIDDEN_WRITES,
    add_call,
    functional_variant,
    source_line,
    symbolic_size,
    tensors_of,
    written_arguments,
)
from autopipe.passes.ir import MEAN, Combine, Input, InputKind

from .norm_statistics import NORMS, momentum_of, separate_statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten

SAME_ORDER = {
    *(aten.detach, aten.alias, aten.view, aten.view_as, aten.reshape, aten.reshape_as, aten.ravel),
    *(aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.contiguous, aten.to),
}
"""Views of all entries in the same order."""

PERMUTED = {
    *(aten.t, aten.transpose, aten.permute, aten.movedim, aten.moveaxis, aten.swapaxes),
    *(aten.swapdims, aten.numpy_T, aten.mT, aten.mH, aten.adjoint, aten.matrix_H),
}
"""Views of all entries with the dimensions in another order."""

SCATTERS = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
"""View of some entries → the op that replaces them in a copy."""


def defer_buffer_writes(
    graph: fx.Graph, inputs: Sequence[Input]
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, Combine]]:
    """Rewrite the ops that write to buffers.

    Args:
        graph: normalized; is changed.
        inputs: its placeholders.

    Returns:
        Buffer placeholder → node of its new value; and, for nodes from which those values are
        computed, how they are combined over micro-batches.

    Raises:
        UnsupportedError: a buffer is written in a way that cannot be rewritten.
    """
    rewriter = _BufferRewriter(graph, inputs)
    for node in list(graph.nodes):
        rewriter.visit(node)
    return rewriter.value, rewriter.reductions


def refuse_batched_writes(graph: fx.Graph, inputs: Sequence[Input]) -> None:
    """Refuse writes of the batch's samples to rows of a buffer.

    Each micro-batch would compute the row indices from its own samples.

    Args:
        graph: normalized.
        inputs: its placeholders.

    Raises:
        UnsupportedError: with the op and the buffer.
    """
    names = {i.name: i.target for i in inputs if i.kind is InputKind.BUFFER}
    buffers = {storage_id_of(n): names[n.name] for n in graph.nodes if n.name in names}
    for node in graph.nodes:
        for target in written_arguments(node):
            shape = target.meta["val"].shape
            if storage_id_of(target) in buffers and any(
                symbolic_size(n).free_symbols for n in shape
            ):
                raise UnsupportedError(
                    "the samples of a batch are written to a buffer",
                    node=node.name,
                    source=source_line(node),
                    found=f"{node.target} writes to {buffers[storage_id_of(target)]} sample by"
                    " sample; micro-batches would all write to the same rows",
                    remedy="return the samples, and write them to the buffer after the call",
                )


class _BufferRewriter:
    """Rewrites one graph, node by node in program order.

    Attributes:
        value: buffer written so far → node of its new value.
        reductions: node that a new value is computed from → how it is combined over micro-batches.
        buffer_of: node → the written buffer whose memory it shares.
        view_args: view of a buffer → its arguments, before they were replaced.
        current: view of a buffer → the same view of the new value.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[Input]) -> None:
        self.graph = graph
        self.target = {i.name: i.target for i in inputs if i.kind is InputKind.BUFFER}
        self.value: dict[fx.Node, fx.Node] = {}
        self.reductions: dict[fx.Node, Combine] = {}
        self.view_args: dict[fx.Node, tuple[Any, Any]] = {}
        self.current: dict[fx.Node, fx.Node] = {}
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        buffers = {storage_id_of(n): n for n in placeholders if n.name in self.target}
        buffer_of = {
            node: buffers[storage_id(t)]
            for node in graph.nodes
            for t in tensors_of(node)
            if storage_id(t) in buffers
        }
        written = {
            buffer_of[t]: n for n in graph.nodes for t in written_arguments(n) if t in buffer_of
        }
        self.buffer_of = {n: b for n, b in buffer_of.items() if b in written}
        self.counters = self._counters(placeholders)
        for node in placeholders:
            if self.buffer_of.get(node, node) is not node:
                buffer = self.buffer_of[node]
                self.refuse(written[buffer], [buffer], f"whose memory {node.name} shares")

    def _counters(self, placeholders: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Running mean → counter of the batches that its norm has seen."""
        by_target = {self.target[n.name]: n for n in placeholders if n.name in self.target}
        return {
            node: by_target[counter]
            for target, node in by_target.items()
            if (counter := target.replace("running_mean", "num_batches_tracked")) != target
            and counter in by_target
        }

    def visit(self, node: fx.Node) -> None:
        """Rewrite one node."""
        targets = [n for n in written_arguments(node) if n in self.buffer_of]
        if not targets and node in self.buffer_of and node.op != "placeholder":
            self.view_args[node] = (node.args, node.kwargs)
        with self.graph.inserting_before(node):
            node.args, node.kwargs = self.read((node.args, node.kwargs))
        if not targets:
            self.current |= {node: node} if node in self.buffer_of else {}
        elif node.target in HIDDEN_WRITES:
            with self.graph.inserting_before(node.next):
                self.visit_norm(node, targets)
        else:
            with self.graph.inserting_before(node):
                self.write(node, targets[0], self.out_of_place(node, targets))
            node.replace_all_uses_with(targets[0])  # an in-place op returns the tensor itself
            self.graph.erase_node(node)

    def read(self, arguments: Any) -> Any:
        """Arguments of a node, with the current values of buffers and of their views."""
        return fx.map_arg(arguments, self._current_value)

    def _current_value(self, node: fx.Node) -> fx.Node:
        if node not in self.buffer_of:
            return node
        if node not in self.current:
            args, kwargs = self.read(self.view_args[node])
            self.current[node] = self.add(node, node.target, *args, **kwargs)
        return self.current[node]

    def _old_value(self, node: fx.Node) -> fx.Node:
        """The value of a buffer, or of a view of it, before the step."""
        if node not in self.view_args:
            return node
        args, kwargs = fx.map_arg(self.view_args[node], self._old_value)
        return self.add(node, node.target, *args, **kwargs)

    def add(self, like: fx.Node, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """Add an op with the source line and module path of `like`."""
        new = add_call(self.graph, target, *args, **kwargs)
        new.meta |= {k: v for k, v in like.meta.items() if k in ("stack_trace", "modules", "calls")}
        return new

    def out_of_place(self, node: fx.Node, targets: list[fx.Node]) -> fx.Node:
        """The value that a node would write, computed by an out-of-place op."""
        old = targets[0].meta["val"]
        if node.target is aten.copy_.default:  # aten.copy has no derivative
            new = self.add(node, aten.expand.default, node.args[1], list(old.shape))
            return self.add(node, aten.clone.default, self.cast(node, new, old.dtype))
        functional = functional_variant(node.target)
        if functional is None or len(written_arguments(node)) != 1:
            self.refuse(node, targets)
        names = {a.name for a in functional._schema.arguments}
        kwargs = {k: v for k, v in node.kwargs.items() if k in names}
        new = self.add(node, functional, *node.args, **kwargs)
        if new.meta["val"].shape != old.shape:
            self.refuse(node, targets, "with another shape")
        return self.cast(node, new, old.dtype)

    def cast(self, node: fx.Node, new: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Convert a value to the dtype of the tensor that it is written to."""
        same = new.meta["val"].dtype == dtype
        return new if same else self.add(node, aten.to.dtype, new, dtype)

    def write(self, node: fx.Node, view: fx.Node, new: fx.Node) -> None:
        """From here on, use `new` as the value of `view`."""
        buffer = self.buffer_of[view]
        current = {view: new}
        while view is not buffer:
            (source, *_), _ = self.view_args[view]
            new = self.replace_view(node, view, self._current_value(source), new)
            current[source] = new
            view = source
        self.current = {
            n: v for n, v in self.current.items() if self.buffer_of.get(n) is not buffer
        } | current
        self.value[buffer] = new

    def replace_view(self, node: fx.Node, view: fx.Node, whole: fx.Node, new: fx.Node) -> fx.Node:
        """A copy of `whole`, with the entries that `view` views replaced by `new`."""
        target: Any = view.target
        args, kwargs = self.view_args[view]
        packet = getattr(target, "overloadpacket", None)
        old = whole.meta["val"]
        if target in SCATTERS:
            return self.add(node, SCATTERS[target], whole, new, *args[1:], **kwargs)
        if target is aten.narrow.default:
            dim, start, length = args[1:]
            start = start % old.shape[dim]
            where = (dim, start, start + length)
            return self.add(node, aten.slice_scatter.default, whole, new, *where)
        if packet in SAME_ORDER and new.meta["val"].dtype == old.dtype:
            return self.add(node, aten.reshape.default, new, list(old.shape))
        if packet in PERMUTED and not old.is_complex():
            example = torch.empty(
                *range(2, old.dim() + 2), device="meta"
            )  # distinct sizes identify dimensions
            order = [n - 2 for n in target(example, *args[1:], **kwargs).shape]
            back = [order.index(d) for d in range(old.dim())]
            return self.add(node, aten.permute.default, new, back)
        self.refuse(node, [view], f"through {target}")

    def visit_norm(self, node: fx.Node, targets: list[fx.Node]) -> None:
        """Rewrite a norm that writes running statistics."""
        if node.target not in NORMS or len(targets) != 2 or momentum_of(node) is None:
            self.refuse(node, targets)

        def add(target: Any, *args: Any) -> fx.Node:
            return self.add(node, target, *args)

        counter = self.counters.get(targets[0])
        counter = counter if counter is None else self._current_value(counter)
        before = self._old_value(targets[0])  # the same for every micro-batch
        mean, variance, packed = separate_statistics(self.graph, node, add, counter, before)
        self.reductions[packed] = MEAN
        self.write(node, targets[0], mean)
        self.write(node, targets[1], variance)

    def refuse(self, node: fx.Node, targets: Sequence[fx.Node], more: str = "") -> NoReturn:
        """Raise the error for a node that writes to these buffers or views."""
        names = ", ".join(self.target[self.buffer_of[t].name] for t in targets)
        raise UnsupportedError(
            "a buffer is written in a way that cannot be deferred to once a step",
            node=node.name,
            source=source_line(node),
            found=f"{node.target} writes to {names} {more}".strip(),
            remedy="write to it by a plain in-place op (copy_, add_); or use"
            ' batch_norm="micro": buffers are then written once per micro-batch',
        )
