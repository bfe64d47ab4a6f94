"""Calls near the inputs may be made in any stage up to their first user: where it costs least.

The lookup in a table that two stages share, say: beside the table what is sent is the activations;
beside their user it is the table's gradient, and memory for a copy. Or a position embedding, made
early in the captured order and used late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.passes.graph import is_size

from .stage_estimate import taken

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import fx

    from autopipe.passes.partition import Dag

    from .assign_stages import Items
    from .stage_estimate import Placement

NEAR = 12
"""Items that an item may depend on if it is to be moved."""

MOVE_STEPS = 1 << 19
"""Calls that all evaluations of moves look at, per graph; a few microseconds each."""


def moved(items: Items, stage_of: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Better stages for the calls near the inputs: less in all, the largest stage no larger."""
    facts, members = items.facts, items.members
    aim = facts.aim
    stages = [stage_of[part[0]] for part in members]
    if aim.is_one_memory:
        return dict(stage_of)

    def made() -> Placement:
        pairs = zip(members, stages, strict=True)
        return {node: (k,) for part, k in pairs for node in part}

    dag = items.dag([0] * len(stages))
    best, steps = taken(facts, made()), MOVE_STEPS
    for group in _groups(items, dag, stages):
        for to in _range(dag, group, stages, aim.stages):
            before = [stages[v] for v in group]
            if (steps := steps - len(facts.calls)) < 0:
                break
            for v in group:
                stages[v] = to
            found = taken(facts, made())
            worse = max(found.seconds) > max(best.seconds) or not found.fits(aim.limits)
            gain = sum(best.seconds) - sum(found.seconds)
            if worse or gain <= 1e-6 * sum(best.seconds) or len(set(stages)) < aim.stages:
                for v, k in zip(group, before, strict=True):
                    stages[v] = k
            else:
                best = found
    return {node: k for node, (k,) in made().items()}


def _groups(items: Items, dag: Dag, stages: list[int]) -> Iterator[list[int]]:
    """Items near the inputs with what only they use, where another stage knows what they know."""
    shared = _shared(items, stages)
    near: dict[int, set[int]] = {}
    for v, before in enumerate(dag.before):
        if any(u not in near for u in before):
            continue
        ancestors = {v}.union(*(near[u] for u in before))
        if len(ancestors) > NEAR:
            continue
        near[v] = ancestors
        group = {v}
        for u in sorted(ancestors - {v}, reverse=True):
            if group.issuperset(dag.after[u]):
                group.add(u)
        if shared & group or any(stages[u] != stages[v] for u in dag.after[v]):
            yield sorted(group)


def _shared(items: Items, stages: list[int]) -> set[int]:
    """The items that use a parameter which several stages use."""
    users: dict[fx.Node, set[int]] = {}
    for v, part in enumerate(items.members):
        for node in part:
            for source in node.all_input_nodes:
                if source.op == "placeholder" and not is_size(source):
                    users.setdefault(source, set()).add(v)
    kinds = [of for of in users.values() if len({stages[v] for v in of}) > 1]
    return set().union(*kinds)


def _range(dag: Dag, group: list[int], stages: list[int], K: int) -> list[int]:
    """The other stages that a group may be in."""
    within = set(group)
    before = [stages[u] for v in group for u in dag.before[v] if u not in within]
    after = [stages[u] for v in group for u in dag.after[v] if u not in within]
    here = {stages[v] for v in group}
    return [k for k in range(max(before, default=0), min(after, default=K - 1) + 1) if {k} != here]
