"""How micro-batch results become the whole batch's.

An output whose shape shows the batch is concatenated. A scalar loss is more delicate: the mean of
chunk means is not the batch's mean when chunks differ in size or in what `ignore_index` leaves
out. So the graph is cut at its batch reductions. Before the cut it runs per micro-batch and yields
sums (and counts); what follows, the *epilogue*, runs once on the combined values, so that any
arithmetic on reduced values (a weighted sum of losses, a ratio of sums) is the whole batch's.

    batched  → shape depends on B                     stays in the stages
    reduced  → no B left, but computed from batched   the first one is split into sum and count,
                                                      what follows goes to the epilogue
    static   → independent of the batch               stays in the stages
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.errors import CouplingError

from .graphs import add_call, drop_dead, emit_size, is_size, size, source_line, spec_of, tensors_of
from .ir import Input, Kind, Leaf, Output, results_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

aten = torch.ops.aten

FACTORIES = {
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.new_empty.default,
}
SUMS = {aten.sum.default, aten.sum.dim_IntList}
MEANS = {aten.mean.default, aten.mean.dim}
COUNTED = {  # position of weight and ignore_index: a mean over what is not ignored
    aten.cross_entropy_loss.default: (2, 4),
    aten.nll_loss.default: (2, 4),
    aten.nll_loss_nd.default: (2, 4),
    aten.nll_loss2d.default: (2, 4),
}
MEAN, SUM = 1, 2  # ATen's numbers for `reduction`


def combine(
    graph: fx.Graph, inputs: Sequence[Input], *, whole: bool = False
) -> tuple[fx.GraphModule, tuple[Output, ...], fx.GraphModule | None, list[Leaf]]:
    """Give every result of a captured graph a rule of combination.

    Args:
        graph: normalized; changed in place (its owner is capture).
        inputs: its placeholders.
        whole: only one micro-batch will ever run, so every result is its.

    Returns:
        The graph as it runs per micro-batch; its outputs; the epilogue, if any; and for each of
        the model's results where it comes from.

    Raises:
        CouplingError: samples of the batch are mixed by something else than a final reduction.
    """
    return _Combine(graph, inputs, whole=whole).run()


def classify(graph: fx.Graph, inputs: Sequence[Input]) -> dict[fx.Node, str]:
    """node → "batched", "reduced", "static" or "size"; see the module's docstring."""
    batched_inputs = {i.name for i in inputs if i.batch_dim is not None}
    kinds: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            kinds[node] = "batched" if node.name in batched_inputs else "static"
        elif node.op == "call_function":
            shapes = [size(s) for t in tensors_of(node) for s in t.shape]
            sources = {kinds[n] for n in node.all_input_nodes}
            if is_size(node):
                kinds[node] = "size"
            elif any(s.free_symbols for s in shapes):
                kinds[node] = "batched"
                _check_coupling(node, kinds)
            elif sources & {"batched", "reduced"} and node.target not in FACTORIES:
                kinds[node] = "reduced"
            else:
                kinds[node] = "static"
    return kinds


def _check_coupling(node: fx.Node, kinds: Mapping[fx.Node, str]) -> None:
    """A batched value computed from a reduction over the batch sees samples of other chunks."""
    for source in node.all_input_nodes:
        if kinds[source] == "reduced":
            raise CouplingError(
                "the model mixes the samples of a batch: every sample's result depends on a"
                " reduction over all of them, which micro-batches would change",
                node=f"{node.name}, through {source.name}",
                source=source_line(source) or source_line(node),
                found=f"{source.target}",
                remedy="use chunks=1, or move this computation out of the pipelined model; if the"
                " value is not meant to depend on the batch, pass the input it comes from with"
                " in_dims=None",
            )


class _Combine:
    """The cut, as one walk: outputs collected in order, the epilogue built beside them."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[Input], *, whole: bool) -> None:
        self.graph = graph
        self.inputs = {i.name: i for i in inputs}
        self.kinds = dict.fromkeys(graph.nodes, "static") if whole else classify(graph, inputs)
        self.outputs: dict[fx.Node, Output] = {}
        self.epilogue = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}  # main graph → epilogue
        self.batch: fx.Node | None = None

    def run(self) -> tuple[fx.GraphModule, tuple[Output, ...], fx.GraphModule | None, list[Leaf]]:
        output = self.graph.output_node()
        results = results_of(self.graph)
        leaves: list[Leaf] = []
        finals: dict[fx.Node, fx.Node] = {}
        needs_epilogue = any(self.kinds[r] == "reduced" for r in results)
        with self.graph.inserting_before(output):
            for result in results:
                item = self.inputs.get(result.name)
                if item is not None and item.kind is Kind.INPUT:
                    leaves.append(Leaf("input", item.index))
                    continue
                if item is not None and item.kind is Kind.PARAMETER:
                    leaves.append(Leaf("parameter", item.target))
                    continue
                if result not in finals:
                    finals[result] = self.final(result)
                leaves.append(Leaf("value", list(finals).index(result)))
        output.args = (tuple(self.outputs),)
        output.meta.pop("val", None)
        drop_dead(self.graph)
        epilogue = None
        if needs_epilogue:
            self.epilogue.output(tuple(finals.values()))
            self._order_placeholders()
            epilogue = fx.GraphModule({}, self.epilogue, "Epilogue")
        module = fx.GraphModule({}, self.graph, "Captured")
        return module, tuple(self.outputs.values()), epilogue, leaves

    def final(self, node: fx.Node) -> fx.Node:
        """The epilogue's node for a value of the main graph."""
        if node not in self.env:
            kind = self.kinds[node]
            if kind == "batched":
                dims = [d for d, s in enumerate(spec_of(node).shape) if s.free_symbols]
                if len(dims) != 1:
                    self._refuse(node, "an output has several dimensions of the batch's size")
                self.yields(node, "cat", dims[0])
            elif kind == "static":
                value = node
                if node.op == "placeholder":  # lent tensors are not results: return a copy
                    value = add_call(self.graph, aten.clone.default, node)
                self.env[node] = self.yields(value, "same")
            elif any(self.kinds[n] == "batched" for n in node.all_input_nodes):
                self.env[node] = self.reduction(node)
            else:
                new = self.epilogue.node_copy(node, self._argument)
                new.meta = dict(node.meta)
                self.env[node] = new
        return self.env[node]

    def _argument(self, node: fx.Node) -> Any:
        if self.kinds[node] == "size":
            return emit_size(node.meta["val"], self.batch_size)
        return self.final(node)

    def batch_size(self) -> fx.Node:
        """The epilogue's placeholder for the number of samples in the whole batch."""
        if self.batch is None:
            first = next(iter(self.epilogue.nodes))
            with self.epilogue.inserting_before(first):
                self.batch = self.epilogue.placeholder("batch_size")
        return self.batch

    def yields(self, node: fx.Node, how: str, dim: int | None = None) -> fx.Node:
        """Make `node` an output of each micro-batch; returns the combined value's placeholder."""
        if node not in self.outputs:
            self.outputs[node] = Output(spec_of(node), how, dim)
            self.env[node] = self.epilogue.placeholder(node.name)
            self.env[node].meta["val"] = node.meta["val"]
        return self.env[node]

    def reduction(self, node: fx.Node) -> fx.Node:
        """Split the first reduction over the batch into what adds up and what is done at the end.

        Formulas: a sum is the sum of sums; a mean over equally many elements per sample is the
        mean of means weighted by samples; a mean over what is not ignored is Σ sums / Σ counts.
        """
        target: Any = node.target
        names = [a.name for a in target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        how = given.get("reduction", MEAN) if "reduction" in names else None
        if node.target in SUMS or how == SUM:
            return self.yields(node, "sum")
        if node.target in COUNTED and how == MEAN:
            return self.counted_mean(node, given)
        if node.target in MEANS or how == MEAN:
            return self.yields(node, "mean")
        self._refuse(node, "a result is reduced over the batch in a way that has no known sum")
        raise AssertionError

    def counted_mean(self, node: fx.Node, given: dict[str, Any]) -> fx.Node:
        """Cross entropy and its kin: the mean over targets that are not `ignore_index`, by class
        weight. A chunk with nothing to count adds 0 to both sums."""
        operator: Any = node.target
        target, weight = given["target"], given.get("weight")
        if target.meta["val"].is_floating_point():  # class probabilities: nothing is ignored
            return self.yields(node, "mean")
        ignore = given.get("ignore_index", -100)
        total = add_call(self.graph, operator, **given | {"reduction": SUM})
        kept = add_call(self.graph, aten.ne.Scalar, target, ignore)
        if weight is not None:
            index = add_call(self.graph, aten.where.ScalarOther, kept, target, 0)
            weights = add_call(self.graph, aten.index.Tensor, weight, [index])
            kept = add_call(self.graph, aten.mul.Tensor, weights, kept)
        count = add_call(self.graph, aten.sum.default, kept)
        ratio = (self.yields(total, "sum"), self.yields(count, "sum"))
        return add_call(self.epilogue, aten.div.Tensor, *ratio)

    def _order_placeholders(self) -> None:
        """Placeholders first, in the order of the outputs, `batch_size` after them."""
        ordered = [self.env[n] for n in self.outputs]
        if self.batch is not None:
            ordered.append(self.batch)
        for before, after in pairwise(ordered):
            before.append(after)

    def _refuse(self, node: fx.Node, problem: str) -> None:
        raise CouplingError(
            problem,
            node=node.name,
            source=source_line(node),
            found=str(node.target),
            remedy="return the unreduced values (or a sum or mean of them) and finish outside",
        )
