"""What the runs of a captured graph's calls take of each device of an aim, as `Loads`.

Items are runs of calls that nothing may part. Times are rounded to a grid of 2^-51 of their sum;
from there on all is exact.

Time of a stage: forward and backward of its calls, what its rematerialization runs again (under
"full" all that the backward needs again, under "min-cut" the cheap calls that `remade` names, with
a fraction something in between), and the transfers across its left boundary: what it receives, and
for what needs one the gradient that it sends back, over its device's link. (The sender is not
charged.) A parameter that an earlier stage holds comes once a step, which is not counted, but its
gradient goes back with every micro-batch. What the caller gives is not counted either.

Memory of a stage, an estimate for the search (the truth is known when the stage is traced):

- a parameter's value, and if it is trained its gradient and optimizer state, in the first stage
  that uses it; value and gradient again in each further one; buffers and constants in each;
- where a parameter is held that stages share (its uses lie further apart than a stage is long), the
  gradients that wait to be added up;
- of one micro-batch, what autograd saves, as the backward needs it, however it is come by;
- of each further micro-batch in flight, what its policy keeps: "none" all of that, "full" nothing,
  "min-cut" what `remade` estimates, a fraction that part of this;
- of each micro-batch in flight what the stage receives, if something is run again or if autograd
  saves it.

A stage that may have several policies has a row for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, fx

from autopipe.passes.graph import is_size
from autopipe.passes.ir import InputKind
from autopipe.passes.partition import Loads, Value

from .call_costs import CallCosts, is_trained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.devices import Link
    from autopipe.passes.remat_policies import Policy

GRID_BITS = 51
"""Sums of times are integers of so many bits (but for a few more where values are fetched)."""


@dataclass(frozen=True)
class SharedValue:
    """A value that more than one item knows, and what of it is of interest.

    Attributes:
        value: who makes and uses it.
        nbytes: its size.
        sent: whether it comes from another stage with every micro-batch.
        gradient: whether a gradient goes back.
        saved: whether some backward reads it.
        held: it is a parameter, buffer or constant.
    """

    value: Value
    nbytes: int
    sent: bool = False
    gradient: bool = False
    saved: bool = False
    held: bool = False


@dataclass(frozen=True, eq=False)
class Rows:
    """Calls in a row, cut into items.

    Attributes:
        facts: of each call.
        calls: N calls in their order.
        starts: the first call of each item; the first is 0.
    """

    facts: CallCosts
    calls: Sequence[fx.Node]
    starts: Sequence[int]

    def loads(self) -> Loads:
        """Of the items, on the aim's devices."""
        aim = self.facts.aim
        known, held, saved = self._known(), self._held_bytes(), self._saved_bytes()
        ways = [(k, policy) for k in range(aim.stages) for policy in aim.policies(k)]
        keys = [(aim.devices[k], policy) for k, policy in ways]
        seconds = {key: self._sums(self.facts.seconds(*key)) for key in dict.fromkeys(keys)}
        whole = max(math.fsum(self.facts.seconds(*key).values()) for key in seconds)
        grid = math.ldexp(1.0, GRID_BITS - math.frexp(whole)[1]) if whole else 1.0
        times = {key: tuple(round(s * grid) for s in row) for key, row in seconds.items()}
        links = dict.fromkeys(device.link for device in aim.devices)
        fetching = {
            link: tuple(round(_fetching(each, link) * grid) for each in known) for link in links
        }
        flying = [(aim.in_flight[k], policy, aim.factor(k)) for k, policy in ways]
        nbytes, copies = {}, {}
        for key in dict.fromkeys(flying):
            n, policy, factor = key
            kept = self._sums(self.facts.kept_bytes(policy))
            columns = zip(held, saved, kept, strict=True)
            waits = self._waiting_bytes(n)
            nbytes[key] = tuple(
                p + waits.get(i, 0) + math.ceil(factor * (s + (n - 1) * m))
                for i, (p, s, m) in enumerate(columns)
            )
            copies[key] = tuple(_copied(each, n, policy, factor) for each in known)
        numbers = iter(range(len(ways)))
        return Loads(
            times=tuple(times[key] for key in keys),
            unit=1 / Fraction(grid),
            nbytes=tuple(nbytes[key] for key in flying),
            limits=tuple(self._limit(*way) for way in ways),
            grains=(1,) * len(ways),
            values=tuple(each.value for each in known),
            fetching=tuple(fetching[aim.devices[k].link] for k, _ in ways),
            copies=tuple(copies[key] for key in flying),
            names=tuple(self.calls[start].name for start in self.starts),
            ways=tuple(tuple(next(numbers) for _ in aim.policies(k)) for k in range(aim.stages)),
        )

    def _limit(self, stage: int, policy: Policy) -> int | None:
        """What a stage may take by the estimate, so that it keeps its limit by what is known."""
        limit = self.facts.aim.limits[stage]
        return (
            None if limit is None else max(0, limit - self.facts.aim.missed.get((stage, policy), 0))
        )

    @cached_property
    def item_of(self) -> dict[fx.Node, int]:
        """The item that each call is in."""
        ends = [*self.starts[1:], len(self.calls)]
        return {
            node: item
            for item, (a, b) in enumerate(zip(self.starts, ends, strict=True))
            for node in self.calls[a:b]
        }

    def _sums(self, values: Mapping[fx.Node, float]) -> list[float]:
        """Over the calls of each item."""
        ends = [*self.starts[1:], len(self.calls)]
        bounds = zip(self.starts, ends, strict=True)
        return [math.fsum(values[node] for node in self.calls[a:b]) for a, b in bounds]

    def _saved_bytes(self) -> list[int]:
        return [int(size) for size in self._sums(self.facts.saved_bytes)]

    @cached_property
    def _uses(self) -> dict[fx.Node, list[int]]:
        """For each tensor that the calls use the items that do, ascending, each once."""
        found: dict[fx.Node, list[int]] = {}
        for node, item in self.item_of.items():
            for source in node.all_input_nodes:
                if is_size(source):
                    continue
                uses = found.setdefault(source, [])
                if not uses or uses[-1] != item:
                    uses.append(item)
        return found

    def _held_bytes(self) -> list[int]:
        """Of the parameters, buffers and constants that each item is the first to use."""
        found = [0] * len(self.starts)
        for node, uses in self._uses.items():
            item = self.facts.inputs.get(node.name)
            if item is not None and item.kind is not InputKind.INPUT:
                found[uses[0]] += self.facts.held_bytes(item)
        return found

    def _waiting_bytes(self, in_flight: int) -> dict[int, int]:
        """Of gradients that wait, at the first items that use the parameters which they are of."""
        found: dict[int, int] = {}
        for node in self.facts.parted:
            first = self._uses[node][0]
            more = self.facts.waiting_bytes(node, in_flight)
            found[first] = found.get(first, 0) + more
        return found

    def _known(self) -> list[SharedValue]:
        """The values that some item after the one that makes them uses."""
        found = []
        for node, uses in self._uses.items():
            item, saved = self.facts.inputs.get(node.name), node in self.facts.saved
            if item is None:
                made = self.item_of[node]
                later = tuple(use for use in uses if use > made)
                if later and isinstance(node.meta["val"], Tensor):
                    wanted = self.facts.wants_gradient(node)
                    size = self.facts.nbytes(node)
                    found.append(SharedValue(Value(made, later), size, True, wanted, saved))
                continue
            size = self.facts.nbytes(node)
            if item.kind is InputKind.INPUT:
                found.append(SharedValue(Value(-1, tuple(uses)), size, saved=saved))
            elif len(uses) > 1:
                value = Value(uses[0], tuple(uses[1:]))
                found.append(SharedValue(value, size, gradient=is_trained(item), held=True))
        return found


def _fetching(known: SharedValue, link: Link) -> float:
    """Seconds of a micro-batch's transfers."""
    return link.seconds(known.nbytes) * (known.sent + known.gradient)


def _copied(known: SharedValue, in_flight: int, policy: Policy, factor: float) -> int:
    """Bytes of a stage that a value comes to."""
    if known.held:
        return known.nbytes * (1 + known.gradient)
    kept = known.saved or policy != "none"
    return math.ceil(known.nbytes * in_flight * factor) if kept else 0
