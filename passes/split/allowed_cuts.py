"""Where the user allows cuts: around whole modules, or only in front of some.

The modules of an op are known from its metadata: their paths, and for each a name of the call. A
module may be called several times; each call counts by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx


@dataclass(frozen=True)
class CutAt:
    """Where a graph may be cut, by paths of modules.

    Attributes:
        whole: modules that are not cut: all ops of a call are in one stage.
        starts: modules with which a stage may start, in the captured order; None: any op.
    """

    whole: frozenset[str] = frozenset()
    starts: frozenset[str] | None = None

    def positions(self, ops: Sequence[fx.Node]) -> list[bool]:
        """For each position 0…N: may a stage start there?

        Args:
            ops: N ops in the captured order. Those between the first and the last op of a call
                belong to it.
        """
        calls = module_calls(ops)
        inside = [0] * (len(ops) + 2)
        for call in calls.values():
            if call.path in self.whole:
                inside[call.first + 1] += 1
                inside[call.last + 1] -= 1
        free = [depth == 0 for depth in accumulate(inside[: len(ops) + 1])]
        if self.starts is None:
            return free
        firsts = {call.first for call in calls.values() if call.path in self.starts}
        return [may and at in firsts for at, may in enumerate(free)]


class ModuleCall(NamedTuple):
    """A call of a module: its path, and the positions of its first and last op."""

    path: str
    first: int
    last: int


def module_calls(ops: Sequence[fx.Node]) -> Mapping[str, ModuleCall]:
    """The calls of modules by their names, in the order of their first ops, outer ones first.

    Args:
        ops: in some order.
    """
    found: dict[str, ModuleCall] = {}
    for at, node in enumerate(ops):
        for path, call in zip(
            node.meta.get("modules", ()), node.meta.get("calls", ()), strict=True
        ):
            first = found[call].first if call in found else at
            found[call] = ModuleCall(path, first, at)
    return found
