"""Give every result of a captured graph a rule that combines the micro-batches' values.

A result that holds the samples is concatenated. A scalar loss is harder: the mean of the
micro-batches' means is not the batch's mean if micro-batches differ in size or in how many targets
`ignore_index` leaves out. So the graph is cut at its batch reductions (`epilogue_cut`). The ops
before the cut run per micro-batch and return sums (and counts). The ops after it, the *epilogue*,
run once per step on the combined values, so any arithmetic on reduced values (a weighted sum of
losses, a ratio of sums) gives the whole batch's result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from autopipe.passes.graph import graph_module, tensor_spec
from autopipe.passes.ir import REDUCTIONS, Combine, Input, InputKind, Output, ResultLeaf, results_of

from .epilogue_cut import EpilogueCut
from .lattice import Mixed, Reduced
from .shares import shared_sources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class CombinedGraph:
    """A captured graph whose outputs have rules of combination.

    Attributes:
        graph_module: the graph that runs per micro-batch.
        outputs: what it returns, and how the micro-batches' values are combined.
        epilogue: the graph that runs once on the whole batch's outputs; None if it is not needed.
        leaves: where each of the model's results comes from.
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
) -> CombinedGraph:
    """Cut a captured graph at its batch reductions and give every output a rule of combination.

    Args:
        graph: normalized; changed in place.
        inputs: its placeholders.
        states: how its nodes depend on the batch (see `lattice`); a node without a state does not.
        updates: buffer placeholder → node of the buffer's value after the call.
        out_reduce: a name in `REDUCTIONS`: the rule for scalar results whose own rule cannot be
            derived.

    Raises:
        CouplingError: an op other than a final reduction mixes the samples of the batch.
    """
    cut = EpilogueCut(graph, inputs, states)
    stated = None if out_reduce is None else REDUCTIONS[out_reduce]
    by_name = {i.name: i for i in inputs}
    leaves: list[ResultLeaf] = []
    finals: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(graph.output_node()):
        for result in results_of(graph):
            item = by_name.get(result.name)
            if item is not None and item.kind is InputKind.INPUT:
                leaves.append(ResultLeaf("input", item.index))
            elif item is not None and item.kind is InputKind.PARAMETER:
                leaves.append(ResultLeaf("parameter", item.target))
            else:
                if result not in finals:
                    finals[result] = _final_value(cut, result, stated)
                leaves.append(ResultLeaf("value", list(finals).index(result)))
        values, written = list(finals.values()), []
        for buffer, value in (updates or {}).items():
            written.append((by_name[buffer.name].target, len(values)))
            values.append(cut.buffer_value(value))
        values += [cut.check(n) for n in shared_sources(graph, states)]
    epilogue = cut.finish(values)
    return CombinedGraph(
        graph_module(graph, "Captured"),
        tuple(cut.outputs.values()),
        epilogue,
        leaves,
        tuple(written),
    )


def _final_value(cut: EpilogueCut, node: fx.Node, stated: Combine | None) -> fx.Node:
    """The whole batch's value of one of the model's results."""
    one = tensor_spec(node).numel == 1
    if stated is not None and one and _underivable(cut, node) is not None:
        return cut.output(node, stated)
    return cut.final_value(node)


def _underivable(cut: EpilogueCut, node: fx.Node) -> fx.Node | None:
    """The first op on the way to a value for which the batch's value cannot be derived."""
    state = cut.state(node)
    if isinstance(state, Mixed):
        return state.node
    if not isinstance(state, Reduced) or isinstance(state.how, Combine):
        return None
    if state.how is None and cut.reduces_samples(node):
        return node
    if state.how is not None and state.how.base(node) is None:
        return None
    found = (_underivable(cut, n) for n in node.all_input_nodes)
    return next((n for n in found if n is not None), None)
