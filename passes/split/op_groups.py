"""Groups of ops that must stay in one stage, and the order in which they are cut.

Ops stay together if they are

- an op with several results and the ops that unpack it, or
- the ops over the lifetime of a tensor that is changed in place: from the first op that uses its
  memory to the last one that writes to it, so that no stage sees another stage change its memory.

The user may ask for larger groups (`CutAt`): whole modules, or all ops up to a module's start.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from autopipe.errors import UnsupportedError
from autopipe.passes._torch import storage_id_of
from autopipe.passes.graph import is_size, source_line, written_arguments
from autopipe.passes.ir import InputKind
from autopipe.passes.partition import Dag

from .stage_loads import OrderedOps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import fx

    from autopipe.passes.ir import Input

    from .op_costs import OpCosts


@dataclass(frozen=True, eq=False)
class OpGroups:
    """The ops of a captured graph, grouped: each group is a run of the captured order.

    Attributes:
        costs: of the ops, which are in the captured order.
        starts: the position of each group's first op, ascending; the first is 0.
    """

    costs: OpCosts
    starts: Sequence[int]

    @classmethod
    def smallest(cls, costs: OpCosts) -> OpGroups:
        """The smallest groups, wherever the user allows cuts.

        Raises:
            UnsupportedError: the model changes an input or a parameter in place.
        """
        allowed = _may_start(costs.ops, costs.annotated.captured.inputs)
        return cls(costs, [p for p in range(len(costs.ops)) if not p or allowed[p]])

    @classmethod
    def of(cls, costs: OpCosts) -> OpGroups:
        """The smallest groups that are not cut where the objective forbids it.

        Raises:
            UnsupportedError: the model changes an input or a parameter in place.
        """
        allowed = costs.objective.cut_at.positions(costs.ops)
        return cls(costs, [p for p in cls.smallest(costs).starts if not p or allowed[p]])

    @property
    def members(self) -> list[list[fx.Node]]:
        """The ops of each group."""
        ops = self.costs.ops
        return [ops[a:b] for a, b in pairwise([*self.starts, len(ops)])]

    def in_order(self, order: Iterable[int] | None = None) -> OrderedOps:
        """The ops with their groups in another order.

        Args:
            order: a permutation of the groups; None: the captured order.
        """
        if order is None:
            return OrderedOps(self.costs, self.costs.ops, self.starts)
        members = self.members
        parts = [members[group] for group in order]
        starts = list(accumulate((len(part) for part in parts[:-1]), initial=0))
        return OrderedOps(self.costs, [node for part in parts for node in part], starts)

    def dag(self, costs: Sequence[int]) -> Dag:
        """The graph of dependencies between groups.

        Args:
            costs: one for each group.

        Returns:
            A DAG. Its edges include dependencies through sizes, although stages compute sizes
            themselves.
        """
        group_of = self.in_order().group_of
        edges = []
        sized: dict[fx.Node, set[int]] = {}  # size node → the groups that it is computed from
        for node in self.costs.annotated.captured.graph_module.graph.nodes:
            sources: set[int] = set()
            for source in node.all_input_nodes:
                sources |= sized.get(source, set())
                if source in group_of:
                    sources.add(group_of[source])
            if is_size(node):
                sized[node] = sources
            elif node in group_of:
                edges += [(a, group_of[node]) for a in sources if a != group_of[node]]
        return Dag.of(costs, edges)

    def stage_of(self, order: Sequence[int], starts: Sequence[int]) -> dict[fx.Node, int]:
        """The stage of each op if an order of the groups is cut.

        Args:
            order: a permutation of the groups.
            starts: positions in the order at which stages 1, 2, … start.
        """
        members = self.members
        bounds = pairwise([0, *starts, len(order)])
        return {
            node: k
            for k, (a, b) in enumerate(bounds)
            for group in order[a:b]
            for node in members[group]
        }


def _may_start(ops: Sequence[fx.Node], inputs: Sequence[Input]) -> list[bool]:
    """For each position 0…N: may a group start there?"""
    position = {n: i for i, n in enumerate(ops)}
    first: dict[int, int] = {}
    blocked = [0] * (len(ops) + 2)
    names = {i.name for i in inputs if i.kind in (InputKind.PARAMETER, InputKind.INPUT)}
    placeholders = [n for op in ops for n in op.all_input_nodes if n.op == "placeholder"]
    fixed = {storage_id_of(n) for n in placeholders if n.name in names}
    changing = {storage_id_of(n) for op in ops for n in written_arguments(op)}

    def hold(start: int, end: int) -> None:
        """Keep ops start…end in one group."""
        if end > start:
            blocked[start + 1] += 1
            blocked[end + 1] -= 1

    for i, node in enumerate(ops):
        for storage in map(storage_id_of, [*node.all_input_nodes, node]):
            if storage is not None:
                first.setdefault(storage, i)
        for read in node.all_input_nodes:  # a buffer, maybe after a write through a view
            storage = storage_id_of(read)
            if storage is not None and storage in changing and read.op == "placeholder":
                hold(first[storage], i)
        for written in written_arguments(node):
            if storage_id_of(written) in fixed:
                raise UnsupportedError(
                    "the model changes one of its inputs or parameters in place",
                    node=node.name,
                    source=source_line(node),
                    found=f"{node.target} writes to {written.name}",
                    remedy="work on a copy: x = x.clone()",
                )
            storage = storage_id_of(written)
            if storage is not None:
                hold(first[storage], i)
        if isinstance(node.meta.get("val"), (tuple, list)):
            hold(i, max((position[u] for u in node.users if u in position), default=i))
    return [depth == 0 for depth in accumulate(blocked[: len(ops) + 1])]
