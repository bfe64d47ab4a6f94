"""How micro-batch results become the whole batch's.

An output that holds the samples is concatenated. A scalar loss is more delicate: the mean of
chunk means is not the batch's mean when chunks differ in size or in what `ignore_index` leaves
out. So the graph is cut at its batch reductions. Before the cut it runs per micro-batch and yields
sums (and counts); what follows, the *epilogue*, runs once on the combined values, so that any
arithmetic on reduced values (a weighted sum of losses, a ratio of sums) is the whole batch's.

What `follow` finds about a value decides where it is computed:

    Samples  in the stages
    Static   in the stages
    Reduced  the first one is split into sum and count, what follows goes to the epilogue
    Mixed    nowhere: micro-batches would change it, which is an error
"""

from __future__ import annotations

from dataclasses import dataclass
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
    written_arguments,
)
from autopipe.passes.ir import Input, InputKind, Output, ResultLeaf, results_of

from .epilogue import Epilogue
from .lattice import STATIC, Mixed, Reduced, Samples
from .partial_reductions import added_to, addend, counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

aten = torch.ops.aten


@dataclass(frozen=True)
class Combined:
    """A captured graph whose results have rules of combination.

    Attributes:
        graph_module: what runs per micro-batch.
        outputs: what it yields, and how the micro-batches' are put together.
        epilogue: what runs once on the whole batch's outputs; None where nothing is left to do.
        leaves: for each of the model's results where it comes from.
        updates: (buffer, index of its new value among the final values).
    """

    graph_module: fx.GraphModule
    outputs: tuple[Output, ...]
    epilogue: fx.GraphModule | None
    leaves: list[ResultLeaf]
    updates: tuple[tuple[str, int], ...]


def combine(
    graph: fx.Graph,
    inputs: Sequence[Input],
    states: Mapping[fx.Node, Any],
    *,
    updates: Mapping[fx.Node, fx.Node] | None = None,
    out_reduce: str | None = None,
) -> Combined:
    """Give every result of a captured graph a rule of combination.

    Args:
        graph: normalized; changed in place (its owner is capture).
        inputs: its placeholders.
        states: what is known of its nodes; a node without a state is `Static`.
        updates: for a buffer's placeholder the node of its value after the call.
        out_reduce: "mean" (weighted by samples) or "sum": the rule for results of one number
            whose own cannot be derived.

    Raises:
        CouplingError: samples of the batch are mixed by something else than a final reduction.
    """
    return _Combine(graph, inputs, states, out_reduce).run(updates or {})


class _Combine:
    """The cut, as one walk: outputs collected in order, the epilogue built beside them."""

    def __init__(
        self,
        graph: fx.Graph,
        inputs: Sequence[Input],
        states: Mapping[fx.Node, Any],
        out_reduce: str | None,
    ) -> None:
        self.graph = graph
        self.program = list(graph.nodes)  # as it was captured
        self.order = {n: i for i, n in enumerate(self.program)}
        self.inputs = {i.name: i for i in inputs}
        self.states = states
        self.out_reduce = out_reduce
        self.outputs: dict[fx.Node, Output] = {}
        self.epilogue = Epilogue()
        self.env: dict[fx.Node, fx.Node] = {}  # main graph → epilogue
        self.writes = InPlaceWrites(graph)
        self.replayed: set[fx.Node] = set()  # whose memory is written to in the epilogue
        self.needs_epilogue = False
        self.internal = False  # what is added from now on serves buffers, not results

    def run(self, updates: Mapping[fx.Node, fx.Node]) -> Combined:
        output = self.graph.output_node()
        leaves: list[ResultLeaf] = []
        finals: dict[fx.Node, fx.Node] = {}
        with self.graph.inserting_before(output):
            for result in results_of(self.graph):
                item = self.inputs.get(result.name)
                if item is not None and item.kind is InputKind.INPUT:
                    leaves.append(ResultLeaf("input", item.index))
                    continue
                if item is not None and item.kind is InputKind.PARAMETER:
                    leaves.append(ResultLeaf("parameter", item.target))
                    continue
                if result not in finals:
                    finals[result] = self.result(result)
                leaves.append(ResultLeaf("value", list(finals).index(result)))
            values = list(finals.values())
            written = []
            self.internal = True
            for buffer, value in updates.items():
                self.needs_epilogue = True
                written.append((self.inputs[buffer.name].target, len(values)))
                values.append(self.update(value))
        output.args = (tuple(self.outputs),)
        output.meta.pop("val", None)
        self.writes.drop(self.replayed)
        epilogue = None
        if self.needs_epilogue:
            made = [self.env[n] for n in self.program if n in self.env]
            epilogue = self.epilogue.finished([o.name for o in self.outputs.values()], made, values)
        return Combined(
            fx.GraphModule({}, self.graph, "Captured"),
            tuple(self.outputs.values()),
            epilogue,
            leaves,
            tuple(written),
        )

    def state(self, node: fx.Node) -> Any:
        return self.states.get(node, STATIC)

    def result(self, node: fx.Node) -> fx.Node:
        """The final value of one of the model's results."""
        stated = self.out_reduce
        if stated is not None and tensor_spec(node).numel == 1 and self.obstacle(node) is not None:
            return self.yields(node, stated)
        return self.final(node)

    def obstacle(self, node: fx.Node) -> fx.Node | None:
        """The first call on the way to a value by which the whole batch's cannot be derived."""
        state = self.state(node)
        if isinstance(state, Mixed):
            return state.node
        if not isinstance(state, Reduced) or state.how not in (None, "added"):
            return None
        if state.how is None and self._is_first(node):
            return node
        return next((o for n in node.all_input_nodes if (o := self.obstacle(n)) is not None), None)

    def _is_first(self, node: fx.Node) -> bool:
        """A reduction over the batch, not a value computed from one."""
        return any(isinstance(self.state(n), (Samples, tuple)) for n in node.all_input_nodes)

    def final(self, node: fx.Node) -> fx.Node:
        """The epilogue's node for a value of the main graph."""
        if node not in self.env and self._is_written(node):
            self.replay(node)
        if node not in self.env:
            state = self.state(node)
            if isinstance(state, Samples):
                self.env[node] = self.samples(node, state)
            elif isinstance(state, Reduced):
                self.needs_epilogue = True
                self.env[node] = self.reduction(node, state)
            elif isinstance(state, Mixed):
                tried = "" if state.certain else "; a trial did not show that samples stay apart"
                refuse(state.node, state.reason + tried)
            else:
                value = node
                if node.op == "placeholder":  # lent tensors are not results: return a copy
                    value = add_call(self.graph, aten.clone.default, node)
                self.env[node] = self.yields(value, "same")
        return self.env[node]

    def samples(self, node: fx.Node, state: Samples) -> fx.Node:
        """Concatenated where the samples are; of several batches in a row, each by itself."""
        if state.numbered is not None:
            refuse(node, "a sample's result depends on its place in the batch")
        if state.outer == 1:
            return self.yields(node, "cat", state.dim)
        self.needs_epilogue = True
        parts = add_call(self.graph, aten.unflatten.int, node, state.dim, [state.outer, -1])
        return add_call(
            self.epilogue.graph,
            aten.flatten.using_ints,
            self.yields(parts, "cat", state.dim + 1),
            state.dim,
            state.dim + 1,
        )

    def reduction(self, node: fx.Node, state: Reduced) -> fx.Node:
        """Split the first reduction over the batch into what adds up and what is done at the end.

        Formulas: a sum is the sum of sums; a mean over equally many elements per sample is the
        mean of means weighted by samples; a mean over what is not ignored is Σ sums / Σ counts.
        """
        if state.how == "counted":
            ratio = [self.yields(n, "sum") for n in counts(self.graph, node)]
            return add_call(self.epilogue.graph, aten.div.Tensor, *ratio)
        if state.how == "added":
            return self.added(node)
        if state.how is not None:
            return self.yields(node, state.how)
        return self.copied(node)

    def _is_written(self, node: fx.Node) -> bool:
        """Its memory holds what is reduced and is written to: on the whole, in the epilogue."""
        if not self.states or not self.writes.to(node):
            return False
        return isinstance(self.state(self.writes.owner[node]), Reduced)

    def replay(self, node: fx.Node) -> None:
        """Copy what is written to a value's memory, from the call that made it to the last."""
        owner = self.writes.owner[node]
        if owner not in self.replayed:
            self.replayed.add(owner)
            self.needs_epilogue = True
            self.env[owner] = self.made(owner)
            for call in self.writes.to(owner):
                self.final(call)
        if node not in self.env:
            self.env[node] = self.copied(node)

    def made(self, owner: fx.Node) -> fx.Node:
        """A value as it was before the first write, in memory of the epilogue's own."""
        state, sources = self.state(owner), owner.all_input_nodes
        how = state.how if isinstance(state, Reduced) else None
        if how is None and all(self.state(n) == STATIC for n in sources):
            how = "same"
        if how is None or how == "counted":
            return self.reduction(owner, state)
        with self.graph.inserting_before(owner.next):
            first = add_call(self.graph, aten.clone.default, owner)
        return add_call(self.epilogue.graph, aten.clone.default, self.yields(first, how))

    def copied(self, node: fx.Node) -> fx.Node:
        """The call itself, in the epilogue."""
        if self.state(node) == Reduced("added"):
            return self.added(node)
        if self._is_first(node):
            refuse(node, "a result is reduced over the batch in a way that has no known sum")
        return self.epilogue.copied(node, partial(self._argument, node))

    def added(self, node: fx.Node) -> fx.Node:
        """What the batch adds to a value, added to the whole's; in place where the call is."""
        added = self.yields(addend(self.graph, node), "sum")
        add = aten.add_.Tensor if written_arguments(node) else aten.add.Tensor
        return add_call(self.epilogue.graph, add, self._argument(node, added_to(node)), added)

    def _argument(self, reader: fx.Node, node: fx.Node) -> Any:
        if is_size(node):
            return emit_size(node.meta["val"], self.epilogue.batch_size)
        item = self.inputs.get(node.name)
        if node.op == "placeholder" and item is not None and item.kind is InputKind.BUFFER:
            return self.epilogue.given(node)
        later = self.writes.to(node)[-1:]
        if self.state(node) == STATIC and later and self.order[later[0]] > self.order[reader]:
            with self.graph.inserting_before(reader):  # as it is now
                node = add_call(self.graph, aten.clone.default, node)
        return self.final(node)

    def update(self, node: fx.Node) -> fx.Node:
        """A buffer's new value; what depends on buffers alone is worked out in the epilogue."""
        if node not in self.env and self._from_buffers(node):
            self.env[node] = self.copied_from_buffers(node)
        return self.env[node] if node in self.env else self.final(node)

    def _from_buffers(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            item = self.inputs.get(node.name)
            return item is not None and item.kind is InputKind.BUFFER
        if self.state(node) != STATIC or is_random(node):  # what was drawn is not drawn again
            return False
        return all(map(self._from_buffers, node.all_input_nodes))

    def copied_from_buffers(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            return self.epilogue.given(node)
        return self.epilogue.copied(node, self.copied_from_buffers)

    def yields(self, node: fx.Node, how: str, dim: int | None = None) -> fx.Node:
        """Make `node` an output of each micro-batch; returns the combined value's placeholder."""
        if node not in self.outputs:
            self.outputs[node] = Output(tensor_spec(node), how, dim, self.internal)
            self.env[node] = self.epilogue.given(node)
        return self.env[node]


def refuse(node: fx.Node, reason: str) -> NoReturn:
    """The model mixes samples at `node`."""
    raise CouplingError(
        f"the model mixes the samples of a batch, so micro-batches would change it: {reason}",
        node=node.name,
        source=source_line(node),
        found=str(node.target),
        remedy="use chunks=1, or return the unreduced values (or a sum or mean of them) and finish"
        ' outside of the model; where the result is one number, out_reduce="mean" or "sum" states'
        " how the micro-batches' are put together; an input that is not batched is named so with"
        " in_dims=None",
    )
