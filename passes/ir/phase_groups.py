"""What the functions of a stage take and return, for phases that run in groups.

A schedule runs the phases of a micro-batch at a stage as one or more actions after its forward:
"RBW" as a whole, or "RB" and later "W", or all three one by one. Each action is a function, which
gets what those before it keep for it, and keeps what those after it need::

    F    [*state, *receives]              -> [*returns, *updates, *saved]
    RB   [*state, *saved, *tangents]      -> [*sent_grads, *kept]
    W    [*state, *kept]                  -> []
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .phased import StagePhases

Groups = tuple[str, ...]
"""How the phases of a micro-batch run at a stage: ("F", "RB", "W")."""


@dataclass(frozen=True, eq=False)
class PhaseFunction:
    """One function of a stage.

    Attributes:
        arguments: the nodes that it gets besides `ctx`, in order.
        nodes: what it computes, in the order of the graph.
        results: what it returns, in order: nodes, or constants.
        gradients: node → positions in `StagePhases.own_grads` of the gradients that it is.
    """

    arguments: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    results: tuple[Any, ...]
    gradients: dict[fx.Node, list[int]]


def phase_functions(stage: StagePhases, groups: Groups) -> list[PhaseFunction]:
    """Divide a stage's joint graph among functions.

    Args:
        stage: its graph, cut into phases.
        groups: letters of the phases that each function computes, in the order in which they run.

    Returns:
        A function for each group.
    """
    _, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    held, received = len(stage.state), len(stage.state) + len(stage.receives)
    state, tangents = placeholders[:held], placeholders[received:]
    by_name = {n.name: n for n in stage.graph.nodes}
    saved = [by_name[n] for n in stage.saved]
    results = stage.results()
    place = _places(stage, groups)
    nodes = [[n for n in stage.graph.nodes if place.get(n) == i] for i in range(len(groups))]
    forward = PhaseFunction(
        tuple(placeholders[:received]),
        tuple(nodes[0]),
        (*results["returns"], *results["updates"], *saved),
        {},
    )
    functions, kept = [forward], saved
    last_use = _last_uses(stage, groups, place)
    for i, letters in enumerate(groups[1:], start=1):
        arriving = tangents if "B" in letters else []
        known = list(dict.fromkeys([*kept, *arriving, *nodes[i]]))
        left = [n for n in known if last_use.get(n, 0) > i]
        sent = results["sent_grads"] if "B" in letters else []
        functions.append(
            PhaseFunction(
                (*state, *kept, *arriving),
                tuple(nodes[i]),
                (*sent, *left),
                _gradients(results["own_grads"], place, i, len(groups) - 1),
            )
        )
        kept = left
    return functions


def _places(stage: StagePhases, groups: Groups) -> dict[fx.Node, int]:
    """The index of the group that computes each node.

    The parts of a result that is a tuple belong to the group of the whole, so that only tensors are
    kept.
    """
    of_letter = {letter: i for i, letters in enumerate(groups) for letter in letters}
    place: dict[fx.Node, int] = {}
    for node in stage.graph.nodes:
        phase = stage.phase_of.get(node.name)
        if phase in of_letter:
            whole = place.get(node.args[0]) if node.target is getitem else None
            place[node] = of_letter[phase] if whole is None else whole
    return place


def _last_uses(stage: StagePhases, groups: Groups, place: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """The index of the last group that needs each node's value."""
    results = stage.results()
    last: dict[fx.Node, int] = {}

    def used(value: Any, group: int) -> None:
        if isinstance(value, fx.Node):
            last[value] = max(last.get(value, 0), group)

    for node, group in place.items():
        for source in node.all_input_nodes:
            used(source, group)
    for i, letters in enumerate(groups):
        if "B" in letters:
            for value in results["sent_grads"]:
                used(value, i)
    for value in results["own_grads"]:
        if isinstance(value, fx.Node) and place.get(value, 0) == 0:
            used(value, len(groups) - 1)
    return last


def _gradients(
    own_grads: Sequence[Any], place: dict[fx.Node, int], group: int, last: int
) -> dict[fx.Node, list[int]]:
    """The gradients that a group adds up: those that it computes; the last one also all others."""
    found: dict[fx.Node, list[int]] = {}
    for i, node in enumerate(own_grads):
        if (place.get(node, 0) or last) == group:
            found.setdefault(node, []).append(i)
    return found
