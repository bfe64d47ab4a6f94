"""Buffers as if the whole batch had been seen once.

A call in place on a buffer would run once per micro-batch: BatchNorm's running statistics would
take M small steps, a counter would count micro-batches. Here such calls are rewritten so that the
buffers are only read, and their new values are results like others: what is reduced over the batch
is combined over the micro-batches, and each buffer is written once a step (`combine`).

The graph is walked in its order. A call that writes becomes the same one out of place; if it wrote
to a view, the view's new value is put into a copy of what it shows. Whoever reads the buffer or a
view of it afterwards reads the new value, or a new view of it.
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
from autopipe.passes.ir import Input, InputKind

from .norm_statistics import NORMS, momentum_of, own_statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten

SAME_ORDER = {
    *(aten.detach, aten.alias, aten.view, aten.view_as, aten.reshape, aten.reshape_as, aten.ravel),
    *(aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.contiguous, aten.to),
}
"""Views of all entries, in the order in which they are."""

TURNED = {
    *(aten.t, aten.transpose, aten.permute, aten.movedim, aten.moveaxis, aten.swapaxes),
    *(aten.swapdims, aten.numpy_T, aten.mT, aten.mH, aten.adjoint, aten.matrix_H),
}
"""Views of all entries, the dimensions in another order."""

SCATTERS = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
"""View of some entries → the call that puts new ones in their place."""


def defer(
    graph: fx.Graph, inputs: Sequence[Input]
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, str]]:
    """Rewrite the calls that write to buffers; changes `graph`.

    Returns:
        For each buffer that is written the node of its new value; for nodes in these values how
        the micro-batches' are combined.

    Raises:
        UnsupportedError: a buffer is written in a way that cannot be rewritten.
    """
    walk = _Walk(graph, inputs)
    for node in list(graph.nodes):
        walk.visit(node)
    return walk.value, walk.how


def check_rows(graph: fx.Graph, inputs: Sequence[Input]) -> None:
    """Refuse writes of the batch's samples to rows of a buffer: which rows, each micro-batch would
    say for itself.

    Raises:
        UnsupportedError: with the call and the buffer.
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


class _Walk:
    """One walk in program order.

    value: for each buffer written so far the node of its value.
    home: the buffer in whose memory a node lies.
    made: how a view of a buffer was made: its arguments, before they were replaced.
    now: nodes in buffers' memory → what shows the same of the present value.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[Input]) -> None:
        self.graph = graph
        self.target = {i.name: i.target for i in inputs if i.kind is InputKind.BUFFER}
        self.value: dict[fx.Node, fx.Node] = {}
        self.how: dict[fx.Node, str] = {}
        self.made: dict[fx.Node, tuple[Any, Any]] = {}
        self.now: dict[fx.Node, fx.Node] = {}
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        buffers = {storage_id_of(n): n for n in placeholders if n.name in self.target}
        home = {
            node: buffers[storage_id(t)]
            for node in graph.nodes
            for t in tensors_of(node)
            if storage_id(t) in buffers
        }
        written = {home[t]: n for n in graph.nodes for t in written_arguments(n) if t in home}
        self.home = {n: b for n, b in home.items() if b in written}
        self.counters = self._counters(placeholders)
        for node in placeholders:
            if self.home.get(node, node) is not node:
                buffer = self.home[node]
                self.refuse(written[buffer], [buffer], f"whose memory {node.name} shows, too")

    def _counters(self, placeholders: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """For each running mean the number of batches that its layer has seen."""
        by_target = {self.target[n.name]: n for n in placeholders if n.name in self.target}
        return {
            node: by_target[counter]
            for target, node in by_target.items()
            if (counter := target.replace("running_mean", "num_batches_tracked")) != target
            and counter in by_target
        }

    def visit(self, node: fx.Node) -> None:
        targets = [n for n in written_arguments(node) if n in self.home]
        if not targets and node in self.home and node.op != "placeholder":
            self.made[node] = (node.args, node.kwargs)
        with self.graph.inserting_before(node):
            node.args, node.kwargs = self.read((node.args, node.kwargs))
        if not targets:
            self.now |= {node: node} if node in self.home else {}
        elif node.target in HIDDEN_WRITES:
            with self.graph.inserting_before(node.next):
                self.norm(node, targets)
        else:
            with self.graph.inserting_before(node):
                self.write(node, targets[0], self.out_of_place(node, targets))
            node.replace_all_uses_with(targets[0])  # in eager torch they are one tensor
            self.graph.erase_node(node)

    def read(self, arguments: Any) -> Any:
        """Arguments of a call, with the present values of buffers and of their views."""
        return fx.map_arg(arguments, self._present)

    def _present(self, node: fx.Node) -> fx.Node:
        if node not in self.home:
            return node
        if node not in self.now:
            args, kwargs = self.read(self.made[node])
            self.now[node] = self.add(node, node.target, *args, **kwargs)
        return self.now[node]

    def _original(self, node: fx.Node) -> fx.Node:
        """What a buffer or a view of it shows before the step."""
        if node not in self.made:
            return node
        args, kwargs = fx.map_arg(self.made[node], self._original)
        return self.add(node, node.target, *args, **kwargs)

    def add(self, like: fx.Node, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call, of the same place in the model as another."""
        new = add_call(self.graph, target, *args, **kwargs)
        new.meta |= {k: v for k, v in like.meta.items() if k in ("stack_trace", "modules")}
        return new

    def out_of_place(self, node: fx.Node, targets: list[fx.Node]) -> fx.Node:
        """What a call would write, as a value of its own."""
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
        """What is written takes the type of where it is written to."""
        same = new.meta["val"].dtype == dtype
        return new if same else self.add(node, aten.to.dtype, new, dtype)

    def write(self, node: fx.Node, view: fx.Node, new: fx.Node) -> None:
        """From here on, `view` shows `new`."""
        buffer = self.home[view]
        now = {view: new}
        while view is not buffer:
            (source, *_), _ = self.made[view]
            new = self.put_back(node, view, self._present(source), new)
            now[source] = new
            view = source
        self.now = {n: v for n, v in self.now.items() if self.home.get(n) is not buffer} | now
        self.value[buffer] = new

    def put_back(self, node: fx.Node, view: fx.Node, whole: fx.Node, new: fx.Node) -> fx.Node:
        """A copy of `whole` of which `view` shows `new`."""
        target: Any = view.target
        args, kwargs = self.made[view]
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
        if packet in TURNED and not old.is_complex():
            example = torch.empty(*range(2, old.dim() + 2), device="meta")  # tells dimensions apart
            order = [n - 2 for n in target(example, *args[1:], **kwargs).shape]
            back = [order.index(d) for d in range(old.dim())]
            return self.add(node, aten.permute.default, new, back)
        self.refuse(node, [view], f"through {target}")

    def norm(self, node: fx.Node, targets: list[fx.Node]) -> None:
        if node.target not in NORMS or len(targets) != 2 or momentum_of(node) is None:
            self.refuse(node, targets)

        def add(target: Any, *args: Any) -> fx.Node:
            return self.add(node, target, *args)

        counter = self.counters.get(targets[0])
        counter = counter if counter is None else self._present(counter)
        before = self._original(targets[0])  # of every micro-batch the same
        mean, variance, packed = own_statistics(self.graph, node, add, counter, before)
        self.how[packed] = "mean"
        self.write(node, targets[0], mean)
        self.write(node, targets[1], variance)

    def refuse(self, node: fx.Node, targets: Sequence[fx.Node], more: str = "") -> NoReturn:
        names = ", ".join(self.target[self.home[t].name] for t in targets)
        raise UnsupportedError(
            "a buffer is written in a way that cannot be done once a step, for the whole batch",
            node=node.name,
            source=source_line(node),
            found=f"{node.target} writes to {names} {more}".strip(),
            remedy='write to it by a plain call in place (copy_, add_); or batch_norm="micro", with'
            " which buffers are written once per micro-batch",
        )
