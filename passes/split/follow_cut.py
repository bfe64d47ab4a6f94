"""Follow an earlier cut: cut another capture of the same model so that parameters stay in place.

A model is captured again in another mode, or for inputs of another structure or length. Its graph
then has mostly the same ops. Each op goes to the stage of the op that it corresponds to, and every
parameter stays with its stage, so that neither weights nor the optimizer's state change devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from autopipe.passes.ir import InputKind

from .duplicate_ops import duplicable_ops
from .op_groups import OpGroups

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import fx

    from autopipe.passes.ir import Split

    from .stage_estimate import Assignment

OpKey = tuple[str, str]
"""An op's target, and the lines of the model that it comes from."""


@dataclass(frozen=True)
class EarlierCut:
    """What there is to follow of a cut.

    Attributes:
        ops: in the captured order, each op and the stages that compute it.
        owners: parameter → the stage that owns it.
    """

    ops: tuple[tuple[OpKey, tuple[int, ...]], ...]
    owners: Mapping[str, int]

    @classmethod
    def of(cls, split: Split) -> EarlierCut:
        """Describe a cut."""
        captured = split.captured
        stages: dict[fx.Node, tuple[int, ...]] = {}
        for k, ops in enumerate(split.ops):
            for node in ops:
                stages[node] = split.duplicated.get(node.name, (k,))
        nodes = enumerate(captured.graph_module.graph.nodes)
        placed = {captured.original_position(i): n for i, n in nodes if n in stages}
        return cls(
            tuple((_key(placed[i]), stages[placed[i]]) for i in sorted(placed)),
            {
                item.target: stage.index
                for stage in split.stages
                for item in stage.held
                if item.kind is InputKind.PARAMETER
            },
        )


def follow_cut(earlier: EarlierCut, groups: OpGroups) -> Assignment:
    """Assign ops to stages as in an earlier cut.

    An op without a counterpart goes to the first stage that has all that it needs. No op is in an
    earlier stage than a parameter that it uses.

    Args:
        earlier: the cut.
        groups: the ops of the graph that is cut now.
    """
    ops = groups.costs.ops
    same = _counterparts(earlier, ops)
    inputs = groups.costs.inputs
    owners = {
        name: earlier.owners[item.target]
        for name, item in inputs.items()
        if item.kind is InputKind.PARAMETER and item.target in earlier.owners
    }
    before = groups.dag([0] * len(groups.starts)).before
    stage_of_group: list[int] = []
    for members, sources in zip(groups.members, before, strict=True):
        wanted = [same[n][0] for n in members if n in same]
        held = [owners[s.name] for n in members for s in n.all_input_nodes if s.name in owners]
        stage_of_group.append(
            max([*wanted, *held, *(stage_of_group[s] for s in sources)], default=0)
        )
    assignment: Assignment = {
        n: (k,) for members, k in zip(groups.members, stage_of_group, strict=True) for n in members
    }
    several = {n for n, stages in same.items() if len(stages) > 1}
    smallest = OpGroups.smallest(groups.costs)
    for node in several & duplicable_ops(smallest) if several else ():
        if assignment[node][0] == same[node][0]:
            assignment[node] = same[node]
    return assignment


def _counterparts(earlier: EarlierCut, ops: Sequence[fx.Node]) -> dict[fx.Node, tuple[int, ...]]:
    """For each op that has a counterpart in the earlier cut, the stages of that one."""
    old = [key for key, _ in earlier.ops]
    new = [_key(n) for n in ops]
    if old == new:
        return {n: stages for n, (_, stages) in zip(ops, earlier.ops, strict=True)}
    found: dict[fx.Node, tuple[int, ...]] = {}
    for at, start, size in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
        found |= {ops[start + i]: earlier.ops[at + i][1] for i in range(size)}
    return found


def _key(node: fx.Node) -> OpKey:
    return str(node.target), node.meta.get("stack_trace") or ""
