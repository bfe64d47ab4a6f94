"""Estimate what "min-cut" saves and recomputes, from the forward of the captured graph alone.

The partitioner itself (`phases/select_saved`) sees a traced stage with its backward. Here the whole
forward is walked once, in order. Of the values that autograd saves, two kinds stay saved: operands
that the backward of a matrix product reads (its kernels must find them in memory), and results of
ops that are not cheap: products, random ops, ops with side effects. The result of a cheap op (one
without FLOPs) is recomputed if the values that must be saved for that need no more memory;
otherwise it is saved.

`benchmarks.kept` compares the estimate with traced stages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autopipe.passes.graph import has_side_effect, is_random, is_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import fx


@dataclass(frozen=True)
class MinCutEstimate:
    """The estimated choice of a min-cut.

    Attributes:
        saved_bytes: by op, bytes of its results that are saved; ops without an entry: none.
        recomputed: ops that the backward recomputes.
    """

    saved_bytes: dict[fx.Node, int] = field(default_factory=dict)
    recomputed: set[fx.Node] = field(default_factory=set)


def estimate_min_cut(
    ops: Sequence[fx.Node],
    autograd_bytes: Mapping[fx.Node, int],
    result_bytes: Callable[[fx.Node], int],
    has_flops: Callable[[fx.Node], bool],
    backward_reads: Callable[[fx.Node], Iterable[fx.Node]],
) -> MinCutEstimate:
    """Estimate what a min-cut saves and recomputes.

    Args:
        ops: in graph order.
        autograd_bytes: by op, bytes of its results that autograd saves.
        result_bytes: returns the bytes of new memory that an op's results need (0 for a view).
        has_flops: returns whether an op does matrix products or the like.
        backward_reads: returns the operands of an op that its backward reads.

    Returns:
        Saved bytes and recomputed ops.
    """
    estimate, every = MinCutEstimate(), set(ops)
    heavy = {n for n in ops if has_flops(n) or is_random(n) or has_side_effect(n)}
    products = (n for n in ops if n in heavy and has_flops(n))
    needed = {_base(s, result_bytes) for n in products for s in backward_reads(n)}
    cheap = every - heavy - needed
    available: set[fx.Node] = set()  # saved, or can be recomputed from saved values
    for node in ops:
        if not autograd_bytes[node]:
            continue
        if node not in cheap:
            estimate.saved_bytes[node] = autograd_bytes[node]
            available.add(node)
            continue
        recomputed, missing = _recomputation(node, every, cheap, available)
        if sum(map(result_bytes, missing)) <= autograd_bytes[node]:
            estimate.saved_bytes.update({n: result_bytes(n) for n in missing})
            estimate.recomputed.update(recomputed)
            available.update(recomputed, missing)
        else:
            estimate.saved_bytes[node] = autograd_bytes[node]
            available.add(node)
    return estimate


def _base(node: fx.Node, result_bytes: Callable[[fx.Node], int]) -> fx.Node:
    """The op that computed the memory behind a chain of views."""
    while node.op == "call_function" and not result_bytes(node) and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node


def _recomputation(
    node: fx.Node, every: set[fx.Node], cheap: set[fx.Node], available: set[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The cheap ops that recompute a value from available ones, and the values to save for that."""
    recomputed, missing, todo = {node}, set(), [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in every or is_size(source) or source in available:
                continue  # (placeholders are always available)
            if source not in cheap:
                missing.add(source)
            elif source not in recomputed:
                recomputed.add(source)
                todo.append(source)
    return recomputed, missing
