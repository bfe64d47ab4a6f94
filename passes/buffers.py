"""Buffers as if the whole batch had been seen once.

A call in place on a buffer would run once per micro-batch: BatchNorm's running statistics would
take M small steps, a counter would count micro-batches. Here such calls are rewritten so that the
buffers are only read, and their new values are results like others: what is reduced over the batch
is combined over the micro-batches, and each buffer is written once a step (`combine`).

BatchNorm still normalises each micro-batch by its own statistics, as in GPipe's paper (section
2.2). The batch's mean and variance follow from those of the micro-batches (n samples times
positions in all, n_i in one; s the old running mean, a shift against cancellation):

    mean = Σ n_i mean_i / n,   variance = Σ n_i (var_i + (mean_i - s)²) / n - (mean - s)²
"""

from __future__ import annotations

import operator
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .graphs import HIDDEN_WRITES, add_call, add_size, owners, size, written_arguments
from .spec import Input, Kind

CUMULATIVE = -1.0
"""What stands for momentum None while a model is captured: 1 / (number of batches so far)."""

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten


def defer(
    graph: fx.Graph, inputs: Sequence[Input]
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, str], list[str]]:
    """Rewrite the calls that write to buffers; changes `graph`.

    Returns:
        For each buffer rewritten the node of its new value; for nodes in these values how the
        micro-batches' are combined; the names of buffers that stay as they are, written once per
        micro-batch, because they are written through views or by an operator of unknown effect.
    """
    buffers = {i.name for i in inputs if i.kind is Kind.BUFFER}
    nodes = {n for n in graph.nodes if n.op == "placeholder" and n.name in buffers}
    owner = owners(graph)
    counters = _counters(graph, inputs)
    left = [b for b in nodes if not _is_simple(graph, b, owner)]
    value: dict[fx.Node, fx.Node] = {}
    how: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        node.args = fx.map_arg(node.args, lambda n: value.get(n, n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: value.get(n, n))
        originals = [
            b for n in written_arguments(node) for b in nodes - set(left) if value.get(b, b) is n
        ]
        if not originals:
            continue
        with graph.inserting_before(node):
            if node.target in HIDDEN_WRITES:
                counter = counters.get(originals[0])
                counter = value.get(counter, counter) if counter is not None else None
                _batch_norm(graph, node, originals, counter, value, how)
            else:
                _out_of_place(graph, node, originals[0], value)
    return value, how, sorted(b.name for b in left)


def _counters(graph: fx.Graph, inputs: Sequence[Input]) -> dict[fx.Node, fx.Node]:
    """For each running mean the number of batches that its layer has seen."""
    nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    by_target = {i.target: nodes[i.name] for i in inputs if i.kind is Kind.BUFFER}
    return {
        node: by_target[counter]
        for target, node in by_target.items()
        if (counter := target.replace("running_mean", "num_batches_tracked")) != target
        and counter in by_target
    }


def _is_simple(graph: fx.Graph, buffer: fx.Node, owner: dict[fx.Node, fx.Node]) -> bool:
    """Whether every write is to the buffer itself, while nothing else looks at its memory."""
    aliases = {n for n, o in owner.items() if o is buffer}
    whole = {buffer}
    writers = []
    for node in graph.nodes:
        targets = [n for n in written_arguments(node) if n in aliases]
        if not targets:
            continue
        if not set(targets) <= whole or not _replaceable(node):
            return False
        writers.append(node)
        if node in aliases:
            whole.add(node)
    order = {n: i for i, n in enumerate(graph.nodes)}
    first = min((order[w] for w in writers), default=len(order))
    views = aliases - whole
    return all(order[user] < first for v in views for user in v.users) or not writers


def _replaceable(node: fx.Node) -> bool:
    if node.target in HIDDEN_WRITES:
        momentum = node.args[6] if len(node.args) > 6 else None
        return node.target is aten.batch_norm.default and isinstance(momentum, float)
    return _functional(node) is not None


def _functional(node: fx.Node) -> Any:
    """``add`` for ``add_``: the same operator, overload by overload, that writes nowhere."""
    target: Any = node.target
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


def _out_of_place(
    graph: fx.Graph, node: fx.Node, buffer: fx.Node, value: dict[fx.Node, fx.Node]
) -> None:
    new = graph.call_function(_functional(node), node.args, node.kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    value[buffer] = new


def _batch_norm(
    graph: fx.Graph,
    node: fx.Node,
    buffers: list[fx.Node],
    counter: fx.Node | None,
    value: dict[fx.Node, fx.Node],
    how: dict[fx.Node, str],
) -> None:
    """Let the call write its statistics (momentum 1) to tensors of its own."""
    x, mean, variance, momentum = node.args[0], node.args[3], node.args[4], node.args[6]
    assert isinstance(x, fx.Node)
    own = [add_call(graph, aten.zeros_like.default, b) for b in buffers]
    node.args = (*node.args[:3], *own, True, 1.0, *node.args[7:])
    with graph.inserting_before(node.next):

        def call(target: Any, *args: Any) -> fx.Node:
            made = add_call(graph, target, *args)
            made.meta |= {k: v for k, v in node.meta.items() if k == "stack_trace"}
            return made

        positions = prod(int(size(n)) for n in x.meta["val"].shape[2:])
        samples = add_size(graph, aten.sym_size.int, x, 0)
        count = add_size(graph, operator.mul, samples, positions)
        moved = call(aten.square.default, call(aten.sub.Tensor, own[0], buffers[0]))
        biased = call(aten.sub.Tensor, own[1], call(aten.div.Tensor, own[1], count))
        packed = call(aten.stack.default, [own[0], moved, biased])
        how[packed] = "mean"
        whole = call(aten.select.int, packed, 0, 0)
        shift = call(aten.square.default, call(aten.sub.Tensor, whole, buffers[0]))
        spread = call(aten.sum.dim_IntList, call(aten.slice.Tensor, packed, 0, 1, 3), [0])
        scaled = call(aten.mul.Tensor, call(aten.sub.Tensor, spread, shift), count)
        unbiased = call(aten.div.Tensor, scaled, add_size(graph, operator.sub, count, 1))
        blend: Any = aten.lerp.Scalar
        if momentum == CUMULATIVE:
            blend = aten.lerp.Tensor
            batches = call(aten.to.dtype, counter, buffers[0].meta["val"].dtype)
            momentum = call(aten.reciprocal.default, batches)
        value[buffers[0]] = call(blend, mean, whole, momentum)
        value[buffers[1]] = call(blend, variance, unbiased, momentum)
