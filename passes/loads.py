"""What the runs of a captured graph's calls take of each device of an aim, as `Loads`.

Items are runs of calls that nothing may part. Times are rounded to a grid of 2^-51 of their sum;
from there on all is exact.

Time of a stage: forward and backward of its calls, the share of their recompute that its
rematerialization runs again, and the transfers across its left boundary: what it receives, and for
what needs one the gradient that it sends back. (The sender is not charged.) A parameter that an
earlier stage holds comes once a step, which is not counted, but its gradient goes back with every
micro-batch. What the caller gives is not counted either.

Memory of a stage, an estimate for the search (the truth is known when the stage is traced):

- a parameter's value, and if it is trained its gradient and optimizer state, in the first stage
  that uses it; value and gradient again in each further one; buffers and constants in each;
- of one micro-batch, what autograd saves, as the backward needs it, however it is come by;
- of each further micro-batch in flight, the share of that which is kept ("none": all);
- of each micro-batch in flight what the stage receives, if something is run again or if autograd
  saves it.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, fx

from .cost import run_again, seconds
from .graphs import is_size, spec_of
from .ir import B, Kind
from .runs import operands_of
from .unequal import Loads, Value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .aim import Aim
    from .devices import Link
    from .ir import Annotated, Flow, Input

GRID_BITS = 51
"""Sums of times are integers of so many bits (but for a few more where values are fetched)."""


@dataclass(frozen=True)
class Known:
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
        annotated: the graph and its costs.
        calls: N calls in their order.
        starts: the first call of each item; the first is 0.
        aim: what they are to be cut for.
    """

    annotated: Annotated
    calls: Sequence[fx.Node]
    starts: Sequence[int]
    aim: Aim

    def loads(self) -> Loads:
        """Of the items, on the aim's devices."""
        aim, K = self.aim, self.aim.stages
        known, parameters, saved = self._known, self._held_bytes, self._saved_bytes
        keys = [(aim.devices[k], aim.again(k)) for k in range(K)]
        seconds = {key: self._seconds(k) for k, key in enumerate(keys)}
        whole = max(map(sum, seconds.values())) if seconds else 0.0
        bits = GRID_BITS - math.frexp(whole)[1] if whole else 0
        grid = math.ldexp(1.0, bits)
        times = {key: tuple(round(s * grid) for s in row) for key, row in seconds.items()}
        links = {
            key: tuple(round(_fetching(each, key[0].link) * grid) for each in known)
            for key in seconds
        }
        flying = [(aim.in_flight[k], aim.kept(k), aim.factor(k)) for k in range(K)]
        nbytes, copies = {}, {}
        for key in set(flying):
            n, kept, factor = key
            weight = factor * (1 + kept * (n - 1))
            pairs = zip(parameters, saved, strict=True)
            nbytes[key] = tuple(p + math.ceil(s * weight) for p, s in pairs)
            copies[key] = tuple(_copied(each, n, kept, factor) for each in known)
        return Loads(
            times=tuple(times[key] for key in keys),
            unit=1 / Fraction(grid),
            nbytes=tuple(nbytes[key] for key in flying),
            limits=aim.limits,
            grains=(1,) * K,
            values=tuple(each.value for each in known),
            fetching=tuple(links[key] for key in keys),
            copies=tuple(copies[key] for key in flying),
            names=tuple(self.calls[start].name for start in self.starts),
        )

    def item(self, position: int) -> int:
        """The item that the call at a position is in."""
        return bisect_right(self.starts, position) - 1

    def _sums(self, values: Sequence[float]) -> list[float]:
        """Over the calls of each item."""
        ends = [*self.starts[1:], len(self.calls)]
        return [math.fsum(values[a:b]) for a, b in zip(self.starts, ends, strict=True)]

    def _seconds(self, stage: int) -> list[float]:
        """Of each item on the device of a stage."""
        aim, costs = self.aim, self.annotated.costs
        share, device = aim.again(stage), aim.devices[stage]
        if aim.times is not None:
            each = [aim.times[n.name] for n in self.calls]
        else:
            used = [costs[n.name] for n in self.calls]
            times = {cost: seconds(cost, device, aim.batch) for cost in set(used)}
            each = [times[cost] for cost in used]
        again = self._again
        pairs = zip(self.calls, each, strict=True)
        return self._sums(
            [t.forward + t.backward + (share * t.recompute if n in again else 0) for n, t in pairs]
        )

    @cached_property
    def _again(self) -> set[fx.Node]:
        """What a backward runs again (the last calls of a stage may do without)."""
        return run_again(self.calls, self.annotated.flows)

    @cached_property
    def _sizes(self) -> dict[object, int]:
        return {}

    def _at_batch(self, expr: object) -> int:
        """A size at the aim's micro-batch; expressions are few, nodes are many."""
        if expr not in self._sizes:
            self._sizes[expr] = int(expr.subs(B, self.aim.batch))  # type: ignore[attr-defined]
        return self._sizes[expr]

    @property
    def _saved_bytes(self) -> list[int]:
        costs = self.annotated.costs
        each = [self._at_batch(costs[n.name].saved_bytes) for n in self.calls]
        return [int(size) for size in self._sums(each)]

    @cached_property
    def _inputs(self) -> dict[str, Input]:
        return {i.name: i for i in self.annotated.captured.inputs}

    @cached_property
    def _uses(self) -> dict[fx.Node, list[int]]:
        """For each tensor that the calls use the items that do, ascending, each once."""
        found: dict[fx.Node, list[int]] = {}
        for position, node in enumerate(self.calls):
            item = self.item(position)
            for source in node.all_input_nodes:
                if is_size(source):
                    continue
                uses = found.setdefault(source, [])
                if not uses or uses[-1] != item:
                    uses.append(item)
        return found

    @property
    def _held_bytes(self) -> list[int]:
        """Of the parameters, buffers and constants that each item is the first to use."""
        found = [0] * len(self.starts)
        for node, uses in self._uses.items():
            item = self._inputs.get(node.name)
            if item is None or item.kind is Kind.INPUT:
                continue
            size, trained = self._at_batch(item.spec.nbytes), _trained(item)
            state = self._at_batch(item.spec.numel) * self.aim.state_bytes
            found[uses[0]] += size + (size + state if trained else 0)
        return found

    @cached_property
    def _known(self) -> list[Known]:
        """The values that some item after the one that makes them uses."""
        flows = self.annotated.flows
        saved = {
            operands_of(node)[i]
            for node in self.calls
            if node.name in flows
            for i in flows[node.name].saves
        }
        position = {node: at for at, node in enumerate(self.calls)}
        found = []
        for node, uses in self._uses.items():
            item = self._inputs.get(node.name)
            if item is None:
                made = self.item(position[node])
                later = tuple(use for use in uses if use > made)
                if later and isinstance(node.meta["val"], Tensor):
                    wanted = _wants_gradient(node, flows)
                    size = self._at_batch(spec_of(node).nbytes)
                    found.append(Known(Value(made, later), size, True, wanted, node in saved))
                continue
            size = self._at_batch(item.spec.nbytes)
            if item.kind is Kind.INPUT:
                found.append(Known(Value(-1, tuple(uses)), size, saved=node in saved))
            elif len(uses) > 1:
                value = Value(uses[0], tuple(uses[1:]))
                found.append(Known(value, size, gradient=_trained(item), held=True))
        return found


def _wants_gradient(node: fx.Node, flows: Mapping[str, Flow]) -> bool:
    """Whether a gradient comes for a call's tensor, or for one that is unpacked."""
    index, at = 0, node
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        at, index = node.args[0], int(node.args[1])  # type: ignore[arg-type]
    return at.name in flows and flows[at.name].gets[index]


def _trained(item: Input) -> bool:
    return item.kind is Kind.PARAMETER and item.requires_grad


def _fetching(known: Known, link: Link) -> float:
    """Seconds of a micro-batch's transfers."""
    return link.seconds(known.nbytes) * (known.sent + known.gradient)


def _copied(known: Known, in_flight: int, kept: float, factor: float) -> int:
    """Bytes of a stage that a value comes to."""
    if known.held:
        return known.nbytes * (1 + known.gradient)
    return math.ceil(known.nbytes * in_flight * factor) if known.saved or kept < 1 else 0
