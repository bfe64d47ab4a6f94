"""What "min-cut" is estimated to keep of a captured graph, and what it runs again.

The partitioner itself (`keep`) sees a traced stage and its backward. Here the whole forward is
walked once, in order. Of what autograd would save kept is whatever the backward of a product reads
(the partitioner keeps what a kernel of the backward must find in memory), and what products, random
and other calls that are not cheap make. What a cheap call makes (one of no FLOPs) is made again if
what has to be kept for that takes no more memory; else it is kept.

Measured against traced stages: `benchmarks.kept`.
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
    """An estimate.

    Attributes:
        kept: bytes that are kept of what calls make.
        again: the calls that are run again.
    """

    kept: dict[fx.Node, int] = field(default_factory=dict)
    again: set[fx.Node] = field(default_factory=set)


def estimate_min_cut(
    calls: Sequence[fx.Node],
    saved: Mapping[fx.Node, int],
    made: Callable[[fx.Node], int],
    flops: Callable[[fx.Node], bool],
    reads: Callable[[fx.Node], Iterable[fx.Node]],
) -> MinCutEstimate:
    """Estimate what a min-cut keeps.

    Args:
        calls: in order.
        saved: bytes that autograd keeps of what each makes.
        made: bytes of new memory that a call's result takes.
        flops: whether a call does any.
        reads: what a call's backward reads of what the call is given.
    """
    found, known = MinCutEstimate(), set(calls)
    heavy = {n for n in calls if flops(n) or is_random(n) or has_side_effect(n)}
    needed = {_maker(s, made) for n in calls if n in heavy and flops(n) for s in reads(n)}
    cheap = known - heavy - needed
    there: set[fx.Node] = set()  # kept, or can be made again from what is
    for node in calls:
        if not saved[node]:
            continue
        if node not in cheap:
            found.kept[node] = saved[node]
            there.add(node)
            continue
        way, missing = _leading(node, known, cheap, there)
        if sum(map(made, missing)) <= saved[node]:
            found.kept.update({n: made(n) for n in missing})
            found.again.update(way)
            there.update(way, missing)
        else:
            found.kept[node] = saved[node]
            there.add(node)
    return found


def _maker(node: fx.Node, made: Callable[[fx.Node], int]) -> fx.Node:
    """The call that a view is of in the end."""
    while node.op == "call_function" and not made(node) and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node


def _leading(
    node: fx.Node, known: set[fx.Node], cheap: set[fx.Node], there: set[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The cheap calls that make a value from what is there, and what else they need."""
    way, missing, todo = {node}, set(), [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in known or is_size(source) or source in there:
                continue  # (what the stage holds or is given is always there)
            if source not in cheap:
                missing.add(source)
            elif source not in way:
                way.add(source)
                todo.append(source)
    return way, missing
