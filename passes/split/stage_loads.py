"""Cost tables for the exact cut of one order of the ops, on the devices of an objective.

The tables have one column per group of ops and one row per stage and policy (see `op_costs` for the
terms). Times are rounded to multiples of 2^-51 of their sum; all later arithmetic is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, fx

from autopipe.passes.graph import is_size
from autopipe.passes.partition import BoundaryValue, DeviceLoads

from .op_costs import OpCosts, activation_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.remat_policies import RematPolicy

    from .op_costs import IncomingValue

GRID_BITS = 51
"""Sums of times are integers of this many bits (and a few more if values are received)."""


@dataclass(frozen=True, eq=False)
class OrderedOps:
    """The ops in some order, in groups that must not be cut.

    Attributes:
        costs: of the ops.
        ops: all of them, in the order that is cut.
        starts: the position of each group's first op, ascending; the first is 0.
    """

    costs: OpCosts
    ops: Sequence[fx.Node]
    starts: Sequence[int]

    def loads(self) -> DeviceLoads:
        """The cost tables of the groups, on the objective's devices."""
        objective = self.costs.objective
        values = self._shared_values()
        rows = [(k, policy) for k in range(objective.stages) for policy in objective.policies(k)]
        keys = [(objective.devices[k], policy) for k, policy in rows]
        seconds = {key: self._sums(self.costs.seconds(*key)) for key in dict.fromkeys(keys)}
        whole = max(math.fsum(self.costs.seconds(*key).values()) for key in seconds)
        grid = math.ldexp(1.0, GRID_BITS - math.frexp(whole)[1]) if whole else 1.0
        times = {key: tuple(round(s * grid) for s in row) for key, row in seconds.items()}
        links = dict.fromkeys(device.link for device in objective.devices)
        receiving = {
            link: tuple(round(value.seconds(link) * grid) for _, value in values) for link in links
        }
        saving = [(objective.in_flight[k], policy) for k, policy in rows]
        nbytes = {key: self._nbytes(*key) for key in dict.fromkeys(saving)}
        copies = {
            (n, policy): tuple(value.memory(policy, n) for _, value in values)
            for n, policy in nbytes
        }
        numbers = iter(range(len(rows)))
        return DeviceLoads(
            times=tuple(times[key] for key in keys),
            unit=1 / Fraction(grid),
            nbytes=tuple(nbytes[key] for key in saving),
            byte_limits=tuple(self._limit(*row) for row in rows),
            units_per_byte=(1,) * len(rows),
            values=tuple(use for use, _ in values),
            receive_times=tuple(receiving[objective.devices[k].link] for k, _ in rows),
            copy_bytes=tuple(copies[key] for key in saving),
            item_names=tuple(self.ops[start].name for start in self.starts),
            stage_options=tuple(
                tuple(next(numbers) for _ in objective.policies(k)) for k in range(objective.stages)
            ),
        )

    def _limit(self, stage: int, policy: RematPolicy) -> int | None:
        """The largest estimate with which a stage, after correction, stays within its limit."""
        objective = self.costs.objective
        limit, more = objective.limits[stage], objective.corrections.get((stage, policy), 0)
        return None if limit is None else max(0, limit - more)

    @cached_property
    def group_of(self) -> dict[fx.Node, int]:
        """The group of each op."""
        ends = [*self.starts[1:], len(self.ops)]
        return {
            node: group
            for group, (a, b) in enumerate(zip(self.starts, ends, strict=True))
            for node in self.ops[a:b]
        }

    def _sums(self, values: Mapping[fx.Node, float]) -> list[float]:
        """Sums over the ops of each group."""
        ends = [*self.starts[1:], len(self.ops)]
        bounds = zip(self.starts, ends, strict=True)
        return [math.fsum(values[node] for node in self.ops[a:b]) for a, b in bounds]

    @cached_property
    def _saved(self) -> list[float]:
        """By group, bytes that autograd saves."""
        return self._sums(self.costs.saved_bytes)

    def _nbytes(self, in_flight: int, policy: RematPolicy) -> tuple[int, ...]:
        """By group, bytes of activations and of the state that the group uses first."""
        saved = self._saved
        more = self._sums(self.costs.saved_bytes_in_flight(policy))
        sizes = [activation_bytes(s, m, in_flight) for s, m in zip(saved, more, strict=True)]
        for node, uses in self._uses.items():
            if node not in self.group_of and self.costs.incoming(node).is_state:
                sizes[uses[0]] += self.costs.owned_bytes(node, in_flight)
        return tuple(sizes)

    @cached_property
    def _uses(self) -> dict[fx.Node, list[int]]:
        """For each value that ops use, the groups that use it, ascending, each once."""
        found: dict[fx.Node, list[int]] = {}
        for node, group in self.group_of.items():
            for source in node.all_input_nodes:
                if is_size(source):
                    continue
                uses = found.setdefault(source, [])
                if not uses or uses[-1] != group:
                    uses.append(group)
        return found

    def _shared_values(self) -> list[tuple[BoundaryValue, IncomingValue]]:
        """The values that are used by other groups than the one that computes or first uses them.

        (An input of the model exists before all groups.)
        """
        found = []
        for node, uses in self._uses.items():
            if node in self.group_of:
                source = self.group_of[node]
                if not isinstance(node.meta["val"], Tensor):
                    continue
            else:
                source = uses[0] if self.costs.incoming(node).is_state else -1
            later = tuple(use for use in uses if use > source)
            if later:
                found.append((BoundaryValue(source, later), self.costs.incoming(node)))
        return found
