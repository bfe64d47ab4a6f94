"""What stages take of their devices, stage by stage, for any assignment of calls.

The same estimate as in `loads`, by definition: there for runs of an order and quick to compare,
here also where a call is made in several stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import fx

from autopipe.passes.graph import is_size
from autopipe.passes.ir import InputKind

from .call_costs import CallCosts, is_trained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.ir import Split
    from autopipe.passes.remat_policies import Policy

    from .objective import Objective

Placement = dict[fx.Node, tuple[int, ...]]
"""For each call the stages that make it, ascending: one, but for what is cheap to repeat."""


@dataclass(frozen=True)
class Taken:
    """Of each stage.

    Attributes:
        seconds: K times of a micro-batch, transfers included.
        nbytes: K sizes.
        remat: K policies that they are taken with.
    """

    seconds: tuple[float, ...]
    nbytes: tuple[int, ...]
    remat: tuple[Policy, ...]

    def fits(self, limits: Sequence[int | None]) -> bool:
        """Whether all limits are kept."""
        pairs = zip(self.nbytes, limits, strict=True)
        return all(limit is None or size <= limit for size, limit in pairs)


def taken(facts: CallCosts, made: Placement) -> Taken:
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
    seconds, nbytes, remat = [], [], []
    for k, own in enumerate(calls):
        used = {s: None for node in own for s in node.all_input_nodes if not is_size(s)}
        outside = [source for source in used if k not in made.get(source, ())]
        for source in outside:
            first.setdefault(source, k)
        stage = _Stage(k, own, outside, first)
        policy, size = _policy(facts, stage)
        seconds.append(_seconds(facts, stage, policy))
        nbytes.append(size)
        remat.append(policy)
    return Taken(tuple(seconds), tuple(nbytes), tuple(remat))


def taken_by(split: Split, aim: Objective) -> Taken:
    """What the stages of a cut would take with another aim."""
    made: dict[fx.Node, tuple[int, ...]] = {}
    for k, calls in enumerate(split.calls):
        for node in calls:
            made[node] = (*made.get(node, ()), k)
    return taken(CallCosts(split.annotated, aim), made)


class _Stage(NamedTuple):
    """A stage: its number, its calls, what it uses that it does not make; who uses what first."""

    k: int
    own: Sequence[fx.Node]
    outside: Sequence[fx.Node]
    first: Mapping[fx.Node, int]


def _policy(facts: CallCosts, stage: _Stage) -> tuple[Policy, int]:
    """Of those that a stage may have the one of least work that keeps its limit, and its bytes.

    (If none does, the one that takes least.)
    """
    limit, least = facts.aim.limits[stage.k], None
    for policy in facts.aim.policies(stage.k):
        size = _bytes(facts, stage, policy)
        if limit is None or size <= limit:
            return policy, size
        if least is None or size < least[1]:
            least = (policy, size)
    assert least is not None
    return least


def _seconds(facts: CallCosts, stage: _Stage, policy: Policy) -> float:
    k, own, outside, first = stage
    device = facts.aim.devices[k]
    each = facts.seconds(device, policy)
    times = [each[node] for node in own]
    for source in outside:
        item = facts.inputs.get(source.name)
        if item is None:
            ways = 1 + facts.wants_gradient(source)
        else:
            ways = int(is_trained(item) and first[source] < k)
        times.append(ways * device.link.seconds(facts.nbytes(source)))
    return math.fsum(times)


def _bytes(facts: CallCosts, stage: _Stage, policy: Policy) -> int:
    k, own, outside, first = stage
    aim = facts.aim
    n, factor, kept = aim.in_flight[k], aim.factor(k), facts.kept_bytes(policy)
    once = sum(facts.saved_bytes[node] for node in own)
    more = (n - 1) * math.fsum(kept[node] for node in own) if n > 1 else 0.0
    size = math.ceil(factor * (once + more)) + aim.missed.get((k, policy), 0)
    for source in outside:
        item = facts.inputs.get(source.name)
        if item is None or item.kind is InputKind.INPUT:
            if policy != "none" or source in facts.saved:
                size += math.ceil(facts.nbytes(source) * n * factor)
        elif first[source] == k:
            size += facts.held_bytes(item) + facts.waiting_bytes(source, n)
        else:
            size += facts.nbytes(source) * (1 + is_trained(item))
    return max(0, size)
