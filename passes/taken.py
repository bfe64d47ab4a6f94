"""What stages take of their devices, stage by stage, for any assignment of calls.

The same estimate as in `loads`, by definition: there for runs of an order and quick to compare,
here also where a call is made in several stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from .callfacts import CallFacts, is_trained
from .graphs import is_size
from .ir import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Made = dict[fx.Node, tuple[int, ...]]
"""For each call the stages that make it, ascending: one, but for what is cheap to repeat."""


@dataclass(frozen=True)
class Taken:
    """Of each stage.

    Attributes:
        seconds: K times of a micro-batch, transfers included.
        nbytes: K sizes.
    """

    seconds: tuple[float, ...]
    nbytes: tuple[int, ...]

    def fits(self, limits: Sequence[int | None]) -> bool:
        """Whether all limits are kept."""
        pairs = zip(self.nbytes, limits, strict=True)
        return all(limit is None or size <= limit for size, limit in pairs)


def taken(facts: CallFacts, made: Made) -> Taken:
    """What the stages take.

    Args:
        facts: of the calls.
        made: who makes them.
    """
    K = facts.aim.stages
    calls: list[list[fx.Node]] = [[] for _ in range(K)]
    for node in facts.calls:
        for k in made[node]:
            calls[k].append(node)
    first: dict[fx.Node, int] = {}
    seconds, nbytes = [], []
    for k, own in enumerate(calls):
        used = {s: None for node in own for s in node.all_input_nodes if not is_size(s)}
        outside = [source for source in used if k not in made.get(source, ())]
        for source in outside:
            first.setdefault(source, k)
        seconds.append(_seconds(facts, k, own, outside, first))
        nbytes.append(_bytes(facts, k, own, outside, first))
    return Taken(tuple(seconds), tuple(nbytes))


def _seconds(
    facts: CallFacts,
    k: int,
    own: Sequence[fx.Node],
    outside: Sequence[fx.Node],
    first: Mapping[fx.Node, int],
) -> float:
    device, aim = facts.aim.devices[k], facts.aim
    each = facts.seconds(device, aim.again(k))
    times = [each[node] for node in own]
    for source in outside:
        item = facts.inputs.get(source.name)
        if item is None:
            ways = 1 + facts.wants_gradient(source)
        else:
            ways = int(is_trained(item) and first[source] < k)
        times.append(ways * device.link.seconds(facts.nbytes(source)))
    return math.fsum(times)


def _bytes(
    facts: CallFacts,
    k: int,
    own: Sequence[fx.Node],
    outside: Sequence[fx.Node],
    first: Mapping[fx.Node, int],
) -> int:
    aim = facts.aim
    n, kept, factor = aim.in_flight[k], aim.kept(k), aim.factor(k)
    saved = sum(facts.saved_bytes[node] for node in own) * factor * (1 + kept * (n - 1))
    size = math.ceil(saved)
    for source in outside:
        item = facts.inputs.get(source.name)
        if item is None or item.kind is Kind.INPUT:
            if kept < 1 or source in facts.saved:
                size += math.ceil(facts.nbytes(source) * n * factor)
        elif first[source] == k:
            size += facts.held_bytes(item)
        else:
            size += facts.nbytes(source) * (1 + is_trained(item))
    return size
