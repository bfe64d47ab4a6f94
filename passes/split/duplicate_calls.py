"""Cheap values that several stages need: made in each of them, where that costs less than sending.

Position tables, masks, casts of ids: made of inputs, constants and buffers alone by calls that need
no gradient and draw nothing. For each that a stage receives the cost of the transfer is compared
with that of making it there, from what the stage has or would have to be sent in its place; so a
wide mask may be sent narrow, and be widened where it is used.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor, fx

from autopipe.passes._torch import storage_id_of
from autopipe.passes.graph import has_side_effect, is_random, is_size, written_arguments
from autopipe.passes.ir import InputKind
from autopipe.passes.partition import Edge, source_side

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.ir import Input

    from .assign_stages import Items
    from .call_costs import CallCosts
    from .stage_estimate import Placement


def repeatable(items: Items) -> set[fx.Node]:
    """The calls that any stage may make for itself; each is an item of its own."""
    facts = items.facts
    captured = facts.annotated.captured
    alone = {part[0] for part in items.members if len(part) == 1}
    changed = {target for target, _ in captured.updates}
    written = {storage_id_of(n) for node in facts.calls for n in written_arguments(node)}
    returned = {output.name for output in captured.outputs}
    found: set[fx.Node] = set()
    for node in facts.calls:
        sources = [source for source in node.all_input_nodes if not is_size(source)]
        if (
            node in alone
            and not any(map(is_size, node.users))
            and isinstance(node.meta.get("val"), Tensor)
            and node.name not in returned
            and getattr(node.target, "namespace", None) == "aten"
            and not (is_random(node) or has_side_effect(node) or facts.wants_gradient(node))
            and not {storage_id_of(n) for n in (node, *sources)} & written
            and all(
                source in found or _is_fixed(facts.inputs.get(source.name), changed)
                for source in sources
            )
        ):
            found.add(node)
    return found


def _is_fixed(item: Input | None, changed: set[str]) -> bool:
    """Whether a placeholder has no gradient and is the same in all stages."""
    if item is None or item.kind is InputKind.PARAMETER:
        return False
    if item.kind is InputKind.INPUT:
        return not (item.spec.dtype.is_floating_point or item.spec.dtype.is_complex)
    return item.target not in changed


def repeated(items: Items, stage_of: Mapping[fx.Node, int]) -> Placement:
    """Who makes each call, given a stage for each."""
    facts = items.facts
    made: Placement = {node: (stage_of[node],) for node in facts.calls}
    if facts.aim.is_one_memory:
        return made
    able = repeatable(items)
    for k in range(facts.aim.stages):
        own = [node for node in facts.calls if k in made[node]]
        for node in _cheapest(facts, k, own, able):
            made[node] = tuple(sorted((*made[node], k)))
    return _needed(items, made, able)


def _cheapest(
    facts: CallCosts, k: int, own: Sequence[fx.Node], able: set[fx.Node]
) -> list[fx.Node]:
    """What a stage should make for itself of what it would be sent, given the calls it makes.

    Exact: of each value it has or has not, makes or is sent, what costs least is a cheapest cut. On
    the source's side of it are (value, "had") and (value, "made").
    """
    device = facts.aim.devices[k]
    seconds = facts.seconds(device, facts.aim.policies(k)[0])
    used = {source: None for node in own for source in node.all_input_nodes}
    here = {*own, *(source for source in used if source not in able)}
    todo = [source for source in used if source not in here]
    edges: dict[Edge, float] = {("source", (node, "had")): math.inf for node in todo}
    seen = set(todo)
    while todo:
        node = todo.pop()
        item = facts.inputs.get(node.name)
        free = item is not None and item.kind is not InputKind.INPUT  # a copy of a constant
        sent = 0.0 if free else device.link.seconds(facts.nbytes(node))
        if node not in able:
            edges[(node, "had"), "sink"] = sent
            continue
        edges[(node, "had"), (node, "made")] = sent
        edges[(node, "made"), "sink"] = seconds[node]
        for source in node.all_input_nodes:
            if not is_size(source) and source not in here:
                edges[(node, "made"), (source, "had")] = math.inf
                todo += [source] if source not in seen else []
                seen.add(source)
    side = source_side(edges, "source", "sink")
    return [node for node in facts.calls if (node, "made") in side]


def _needed(items: Items, made: Placement, able: set[fx.Node]) -> Placement:
    """Without what a stage makes for nobody, as all who need it make it for themselves.

    (A stage keeps the last call that no stage before makes.)
    """
    own = Counter(stages[0] for stages in made.values())
    found = dict(made)
    for node in reversed(items.facts.calls):
        stages = found[node]
        if node not in able or len(stages) == 1:
            continue
        wanted = {k for user in node.users for k in found[user]}
        if wanted - set(stages):  # someone is sent it
            wanted.add(stages[0])
        for k in stages:
            first = found[node][0]
            if k not in wanted and len(found[node]) > 1 and (k != first or own[k] > 1):
                found[node] = tuple(other for other in found[node] if other != k)
                own[first] -= 1
                own[found[node][0]] += 1
    return found
