"""Cut a captured graph at its batch reductions into a micro-batch graph and an epilogue.

A node's state (see `lattice`) decides where the whole batch's value is computed:

    Samples  per micro-batch, then concatenated
    Static   per micro-batch; the first micro-batch's value is used
    Reduced  the first reduction per micro-batch, then combined; later ops in the epilogue
    Mixed    nowhere: micro-batches would change the value, so the model is refused
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx

from autopipe.errors import CouplingError
from autopipe.passes.graph import (
    InPlaceWrites,
    add_call,
    emit_size,
    is_random,
    is_size,
    source_line,
    tensor_spec,
)
from autopipe.passes.ir import (
    REDUCTIONS,
    SAME,
    SUM,
    Combine,
    Concatenate,
    Input,
    InputKind,
    Output,
)

from .epilogue import Epilogue
from .lattice import STATIC, Mixed, Reduced, Samples
from .partial_reductions import PartialReduction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

aten, ops = torch.ops.aten, torch.ops.autopipe


class EpilogueCut:
    """Collects the outputs of the micro-batch graph in order, and builds the epilogue.

    Args:
        graph: the captured graph; ops are added to it, and `finish` sets its outputs.
        inputs: its placeholders.
        states: how its nodes depend on the batch.

    Attributes:
        outputs: node of the captured graph → output that every micro-batch returns.
    """

    def __init__(
        self, graph: fx.Graph, inputs: Sequence[Input], states: Mapping[fx.Node, Any]
    ) -> None:
        self.graph = graph
        self.states = states
        self.outputs: dict[fx.Node, Output] = {}
        self._program = list(graph.nodes)  # as it was captured
        self._order = {n: i for i, n in enumerate(self._program)}
        self._inputs = {i.name: i for i in inputs}
        self._epilogue = Epilogue()
        self._final: dict[fx.Node, fx.Node] = {}  # captured node → epilogue node
        self._writes = InPlaceWrites(graph)
        self._replayed: set[fx.Node] = set()  # memory owners whose writes run in the epilogue
        self._needs_epilogue = False
        self._for_buffers = False  # outputs added from now on are for buffers, not results

    def finish(self, values: Sequence[fx.Node]) -> fx.GraphModule | None:
        """Set the outputs of the captured graph, and finish the epilogue.

        Args:
            values: the final values, as nodes of the epilogue.

        Returns:
            The epilogue; None if the combined outputs are the final values.
        """
        output = self.graph.output_node()
        output.args = (tuple(self.outputs),)
        output.meta.pop("val", None)
        self._writes.remove_unread(self._replayed)
        if not self._needs_epilogue:
            return None
        program = [self._final[n] for n in self._program if n in self._final]
        return self._epilogue.finish([o.name for o in self.outputs.values()], program, values)

    def state(self, node: fx.Node) -> Any:
        """How a node of the captured graph depends on the batch."""
        return self.states.get(node, STATIC)

    def reduces_samples(self, node: fx.Node) -> bool:
        """Whether a node reads samples itself: it is a reduction, not a value computed from one."""
        return any(isinstance(self.state(n), (Samples, tuple)) for n in node.all_input_nodes)

    def output(self, node: fx.Node, combine: Combine) -> fx.Node:
        """Make `node` an output of every micro-batch.

        Returns:
            The epilogue's placeholder for the combined value.
        """
        if node not in self.outputs:
            self.outputs[node] = Output(tensor_spec(node), combine, self._for_buffers)
            self._final[node] = self._epilogue.placeholder_for(node)
        return self._final[node]

    def final_value(self, node: fx.Node) -> fx.Node:
        """The whole batch's value of a node, as a node of the epilogue.

        Raises:
            CouplingError: micro-batches would change the value.
        """
        if node not in self._final and self._is_replayed(node):
            self._replay_writes(node)
        if node not in self._final:
            state = self.state(node)
            if isinstance(state, Samples):
                self._final[node] = self._concatenated(node, state)
            elif isinstance(state, Reduced):
                self._needs_epilogue = True
                self._final[node] = self._reduced(node, state.how)
            elif isinstance(state, Mixed):
                tried = "" if state.proven else "; a trial did not show that samples stay apart"
                refuse(state.node, state.reason + tried)
            else:
                value = node
                if node.op == "placeholder":  # a stage cannot return its placeholder: copy it
                    value = add_call(self.graph, aten.clone.default, node)
                self._final[node] = self.output(value, SAME)
        return self._final[node]

    def buffer_value(self, node: fx.Node) -> fx.Node:
        """A buffer's new value; the epilogue computes values that depend on buffers alone."""
        self._needs_epilogue = self._for_buffers = True
        if node not in self._final and self._reads_only_buffers(node):
            self._final[node] = self._copied_from_buffers(node)
        return self._final[node] if node in self._final else self.final_value(node)

    def check(self, node: fx.Node) -> fx.Node:
        """Check once per step, in the epilogue, what the samples take; see `shares`.

        Args:
            node: the op that takes it: ``masked_scatter(into, mask, source)``.

        Returns:
            The epilogue's node that raises the error; it must be among the final values.
        """
        self._needs_epilogue = self._for_buffers = True
        with self.graph.inserting_before(node):
            counts = add_call(self.graph, ops.count_shares.default, *node.args[:3])
        sums, where = self.output(counts, SUM), source_line(node) or ""
        return add_call(self._epilogue.graph, ops.check_shares.default, sums, node.name, where)

    # How a value is combined

    def _concatenated(self, node: fx.Node, state: Samples) -> fx.Node:
        """Concatenate along the samples' dimension.

        If it holds ``outer`` batches in a row, each batch is concatenated separately:
        (outer·n, …) → (outer, n, …) per micro-batch → (outer, N, …) → (outer·N, …).
        """
        if state.index_step is not None:
            refuse(node, "a sample's result depends on its position in the batch")
        if state.batches == 1:
            return self.output(node, Concatenate(state.dim))
        self._needs_epilogue = True
        parts = add_call(self.graph, aten.unflatten.int, node, state.dim, [state.batches, -1])
        return add_call(
            self._epilogue.graph,
            aten.flatten.using_ints,
            self.output(parts, Concatenate(state.dim + 1)),
            state.dim,
            state.dim + 1,
        )

    def _how(self, node: fx.Node) -> Combine | PartialReduction | None:
        state = self.state(node)
        return state.how if isinstance(state, Reduced) else None

    def _reduced(self, node: fx.Node, how: Combine | PartialReduction | None) -> fx.Node:
        """Combine a reduction over the batch; copy a value computed from one to the epilogue."""
        if isinstance(how, Combine):
            return self.output(node, how)
        if how is not None:
            return self._from_partial_sums(node, how)
        return self._copied(node)

    def _from_partial_sums(self, node: fx.Node, how: PartialReduction) -> fx.Node:
        sums = [self.output(n, SUM) for n in how.partial_sums(self.graph, node)]
        source = how.base(node)
        base = None if source is None else self._argument(node, source)
        return how.finish(self._epilogue.graph, node, sums, base)

    def _copied(self, node: fx.Node) -> fx.Node:
        """Copy the op to the epilogue."""
        if self.reduces_samples(node):
            refuse(node, "a result is reduced over the batch in a way that has no known sum")
        return self._epilogue.copy_op(node, partial(self._argument, node))

    def _argument(self, reader: fx.Node, node: fx.Node) -> Any:
        """The value that `reader`, copied to the epilogue, reads there instead of `node`."""
        if is_size(node):
            return emit_size(node.meta["val"], self._epilogue.size)
        item = self._inputs.get(node.name)
        if node.op == "placeholder" and item is not None and item.kind is InputKind.BUFFER:
            return self._epilogue.placeholder_for(node)
        later = self._writes.writers_of(node)[-1:]
        if self.state(node) == STATIC and later and self._order[later[0]] > self._order[reader]:
            with self.graph.inserting_before(reader):  # its value before the later write
                node = add_call(self.graph, aten.clone.default, node)
        return self.final_value(node)

    # In-place writes to reduced values

    def _is_replayed(self, node: fx.Node) -> bool:
        """Whether its memory holds a reduced value and is written to: then the epilogue writes."""
        if not self.states or not self._writes.writers_of(node):
            return False
        return isinstance(self.state(self._writes.owner[node]), Reduced)

    def _replay_writes(self, node: fx.Node) -> None:
        """Copy the ops that write to a value's memory to the epilogue, in program order."""
        owner = self._writes.owner[node]
        if owner not in self._replayed:
            self._replayed.add(owner)
            self._needs_epilogue = True
            self._final[owner] = self._before_writes(owner)
            for write in self._writes.writers_of(owner):
                self.final_value(write)
        if node not in self._final:
            how = self._how(node)
            if isinstance(how, PartialReduction):
                self._final[node] = self._from_partial_sums(node, how)
            else:
                self._final[node] = self._copied(node)

    def _before_writes(self, owner: fx.Node) -> fx.Node:
        """A value as it was before the first write, in memory that the epilogue may write to."""
        how = self._how(owner)
        if how is None and all(self.state(n) == STATIC for n in owner.all_input_nodes):
            how = SAME
        if not isinstance(how, Combine):
            return self._reduced(owner, how)
        with self.graph.inserting_before(owner.next):
            first = add_call(self.graph, aten.clone.default, owner)
        return add_call(self._epilogue.graph, aten.clone.default, self.output(first, how))

    # Values that depend on buffers alone

    def _reads_only_buffers(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            item = self._inputs.get(node.name)
            return item is not None and item.kind is InputKind.BUFFER
        if self.state(node) != STATIC or is_random(node):  # random numbers are drawn only once
            return False
        return all(map(self._reads_only_buffers, node.all_input_nodes))

    def _copied_from_buffers(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            return self._epilogue.placeholder_for(node)
        return self._epilogue.copy_op(node, self._copied_from_buffers)


def refuse(node: fx.Node, reason: str) -> NoReturn:
    """Refuse a model that mixes samples at `node`.

    Raises:
        CouplingError: always.
    """
    names = " or ".join(f'"{name}"' for name in REDUCTIONS)
    raise CouplingError(
        f"the model mixes the samples of a batch, so micro-batches would change it: {reason}",
        node=node.name,
        source=source_line(node),
        found=str(node.target),
        remedy="use chunks=1, or return the unreduced values (or a sum or mean of them) and finish"
        f" outside of the model; where the result is one number, out_reduce={names} states how the"
        " micro-batches' values are combined; an input that is not batched is named with"
        " in_dims=None",
    )
