"""Cut a cost graph into stages, and prove how close to optimal the cut is.

A pipeline is as slow as its slowest stage, so the cut minimizes the largest stage (GPipe, arXiv
1811.06965, section 2.2, minimizes the variance by a heuristic instead). Every acyclic K-split of a
graph is a contiguous cut of *some* topological order. For one order the optimum is cheap to compute
(`chain_cut`). Finding the best order is NP-hard; `order_search` searches for it, and bounds the
optimum over all orders.

All comparisons are between integers (`scaled_integers`), so the optimum is exact, and a second
criterion (the bytes that cross a cut) never finds it "infeasible by one ulp".
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from autopipe.errors import OptionError, PartitionError, VerifyError

from .cost_graph import CostGraph
from .cut_traffic import crossing_at_order, minimize_crossing
from .dag import Dag
from .device_loads import DeviceLoads, DeviceSpec
from .hetero_cut import cut_for_devices
from .lower_bounds import simple_bound
from .order_search import OrderSearchResult, alternative_orders, is_refuted, search_orders
from .scaled_integers import to_integers, unit_of

ORDER_STEPS = 1 << 18
"""Budget for cutting orders on different devices, in items times stages (at least one is cut)."""


@dataclass(frozen=True)
class Partition:
    """The stage of each node, and how close to optimal the cut is.

    Attributes:
        stage_of: node name to stage index.
        stage_seconds: K stage costs.
        bottleneck: seconds of the largest stage.
        lower_bound: seconds; the largest stage of every K-split of the graph, in any order, takes
            at least that long. If it equals the bottleneck, the cut is optimal.
        stage_bytes: memory of each stage on its device, K values; None if no devices were given.
    """

    stage_of: Mapping[str, int]
    stage_seconds: tuple[float, ...]
    bottleneck: float
    lower_bound: float
    stage_bytes: tuple[int, ...] | None = None

    @property
    def balance(self) -> float:
        """Mean stage / largest stage, at most 1: a factor of the pipeline's speed-up."""
        mean = math.fsum(self.stage_seconds) / len(self.stage_seconds)
        return min(1.0, mean / self.bottleneck) if self.bottleneck else 1.0

    @property
    def gap(self) -> float:
        """How far the bottleneck is above the lower bound, as a fraction of the bound."""
        return self.bottleneck / self.lower_bound - 1 if self.lower_bound else 0.0

    def __str__(self) -> str:
        count = Counter(self.stage_of.values())
        lines = ["stage  nodes       seconds  of bottleneck"]
        for stage, seconds in enumerate(self.stage_seconds):
            share = seconds / self.bottleneck if self.bottleneck else 1.0
            lines.append(f"{stage:5}  {count[stage]:5}  {seconds:12.6g}  {share:13.3f}")
        bound = f"bottleneck {self.bottleneck:.6g} s, lower bound {self.lower_bound:.6g} s"
        gap = f"gap {self.gap:.2%}" if self.gap else "optimal"
        return "\n".join([*lines, f"{bound} ({gap}), balance {self.balance:.3f}"])

    def verify(self, graph: CostGraph, devices: Sequence[DeviceSpec] | None = None) -> None:
        """Check this partition against its graph and devices; the bound is proven again.

        Args:
            graph: the one that was cut.
            devices: as given to `partition`.

        Raises:
            VerifyError: a node in no stage or out of range, an empty stage, an edge that goes
                backward, sums that do not agree, a stage above its device's limit, or a bound that
                is above the bottleneck, below the bound that follows from the costs alone, or not
                proven by as much search as `partition` does.
        """
        K = len(self.stage_seconds)
        members: list[list[int]] = [[] for _ in range(K)]
        for name in self.stage_of.keys() - set(graph.names):
            raise VerifyError("a node is not in the graph", node=name)
        for node, name in enumerate(graph.names):
            stage = self.stage_of.get(name, -1)
            if not 0 <= stage < K:
                raise VerifyError(f"a node is in none of {K} stages", node=name, found=str(stage))
            members[stage].append(node)
        for producer, consumer in graph.edges:
            a, b = graph.names[producer], graph.names[consumer]
            if self.stage_of[a] > self.stage_of[b]:
                found = f"{a} in stage {self.stage_of[a]}, {b} in stage {self.stage_of[b]}"
                raise VerifyError("an edge goes backward", node=b, found=found)
        if devices is not None and len(devices) != K:
            raise VerifyError(f"{K} stages on {len(devices)} devices")
        for stage, nodes in enumerate(members):
            if not nodes:
                raise VerifyError(f"stage {stage} has no node")
            device = DeviceSpec() if devices is None else devices[stage]
            seconds = graph.seconds if device.seconds is None else device.seconds
            cost = math.fsum(seconds[node] for node in nodes)
            cost = cost / device.speed if device.seconds is None else cost
            _check_close(f"cost of stage {stage}", cost, self.stage_seconds[stage])
        _check_close("bottleneck", max(self.stage_seconds), self.bottleneck)
        if devices is None:
            self._verify_bound(graph, K)
        else:
            self._verify_devices(graph, devices, members)

    def _verify_bound(self, graph: CostGraph, K: int) -> None:
        dag, unit = _dag(graph)
        least = _seconds(simple_bound(dag.costs, K), unit)
        if not least <= self.lower_bound <= self.bottleneck:
            expected = f"between {least!r} s, by the costs alone, and the bottleneck"
            found = f"{self.lower_bound!r} s"
            raise VerifyError("the lower bound is out of range", expected=expected, found=found)
        # The bound is rounded to a float, so what must be refuted is the next float below it.
        below = Fraction(math.nextafter(self.lower_bound, 0))
        if self.lower_bound > least and not is_refuted(dag, K, math.floor(below / unit)):
            raise VerifyError("the lower bound is not proven", found=f"{self.lower_bound!r} s")

    def _verify_devices(
        self, graph: CostGraph, devices: Sequence[DeviceSpec], members: Sequence[Sequence[int]]
    ) -> None:
        # The nodes, stage by stage, are an order in which the stages are contiguous.
        order = [node for nodes in members for node in nodes]
        loads = _device_loads(graph, devices, order)
        starts = list(accumulate(len(nodes) for nodes in members))[:-1]
        nbytes = loads.stage_bytes(starts)
        if self.stage_bytes != nbytes:
            expected, found = f"{nbytes} bytes", f"{self.stage_bytes}"
            raise VerifyError("the bytes of the stages are wrong", expected=expected, found=found)
        for stage, (device, size) in enumerate(zip(devices, nbytes, strict=True)):
            if device.memory_bytes is not None and size > device.memory_bytes:
                expected, found = f"at most {device.memory_bytes} bytes", f"{size} bytes"
                problem = f"stage {stage} does not fit its device"
                raise VerifyError(problem, expected=expected, found=found)
        _check_close("lower bound", _seconds(loads.lower_bound, loads.unit), self.lower_bound)


def partition(
    costs: CostGraph,
    stages: int,
    *,
    slack: float = 0.0,
    devices: Sequence[DeviceSpec] | None = None,
) -> Partition:
    """Cut a cost graph into K stages; the largest stage is the smallest that the search finds.

    The cut is never worse than the exact contiguous cut of `costs.order()`. It is proven optimal if
    the bound equals the bottleneck: always for chains, and for graphs whose ideals can be
    enumerated within a bounded amount of work (see `order_search`).

    If output sizes are known, a cut with few bytes across boundaries is chosen among equally good
    ones (a value that skips a stage counts once for each boundary that it crosses).

    With `devices`, stage k is on device k. The cut is then exact for `costs.order()` under the
    devices' memory limits, and the other orders that the search finds for equal devices are tried
    as well. The bound is weaker: no search tightens it.

    Args:
        costs: N nodes.
        stages: K, at most N.
        slack: how far the largest stage may be above the best one found, as a fraction >= 0, for
            fewer bytes.
        devices: K devices; None: equal ones without memory limits.

    Raises:
        OptionError: `stages` < 1, `slack` is not a finite fraction >= 0, or `devices` are not K or
            have a value out of range.
        PartitionError: the graph is not valid, or has fewer nodes than `stages`; or no cut fits the
            memory limits: which stage, and how many bytes are missing.
    """
    order, N = costs.order(), len(costs.names)
    if stages < 1:
        raise OptionError("too few stages", expected="stages >= 1", found=str(stages))
    if not 0 <= slack < math.inf:
        raise OptionError("`slack`", expected="a finite fraction >= 0", found=str(slack))
    if stages > N:
        raise PartitionError(
            f"{stages} stages requested, {N} possible",
            expected="at least one node in each stage",
            found=f"{N} nodes",
            remedy=f"use at most {N} stages" if N else None,
        )
    if devices is not None and len(devices) != stages:
        found = f"{len(devices)}"
        raise OptionError("`devices`", expected=f"{stages}, one for each stage", found=found)
    dag, unit = _dag(costs)
    searched = search_orders(dag, stages)
    if devices is not None:
        return _on_devices(costs, devices, dag, searched, slack)
    limit = min(sum(dag.costs), math.floor(searched.bottleneck * (1 + Fraction(slack))))
    nbytes = [0] * N if costs.nbytes is None else [costs.nbytes[node] for node in order]
    orders = [*searched.orders, *(alternative_orders(dag, stages, limit) if any(nbytes) else ())]
    best = minimize_crossing(dag, nbytes, orders, stages, limit)
    stage_of = {costs.names[node]: stage for node, stage in zip(order, best, strict=True)}
    members: list[list[float]] = [[] for _ in range(stages)]
    for name, seconds in zip(costs.names, costs.seconds, strict=True):
        members[stage_of[name]].append(seconds)
    sums = tuple(math.fsum(values) for values in members)
    return Partition(stage_of, sums, max(sums), _seconds(searched.lower_bound, unit))


def _on_devices(
    costs: CostGraph,
    devices: Sequence[DeviceSpec],
    dag: Dag,
    searched: OrderSearchResult,
    slack: float,
) -> Partition:
    """The best exact cut over the orders that the search found; the first is `costs.order()`."""
    order, K = costs.order(), len(devices)
    nbytes = [0 if costs.nbytes is None else costs.nbytes[node] for node in order]
    found: list[tuple[int, tuple[int, ...], list[int], DeviceLoads]] = []
    failed: list[PartitionError] = []
    orders = [*searched.orders, *alternative_orders(dag, K, searched.bottleneck)]
    for one in orders[: max(1, ORDER_STEPS // (len(order) * K))]:
        loads = _device_loads(costs, devices, [order[v] for v in one])
        crossing = crossing_at_order(dag, nbytes, one)
        try:
            starts = cut_for_devices(loads, crossing if any(nbytes) else None, slack)
        except PartitionError as error:
            failed.append(error)
        else:
            nodes = [order[v] for v in one]
            found.append((max(loads.stage_times(starts)), starts, nodes, loads))
    if not found:
        raise failed[0]
    _, starts, nodes, loads = min(found, key=lambda each: each[0])
    stage_of = {costs.names[node]: bisect_right(starts, at) for at, node in enumerate(nodes)}
    times = tuple(_seconds(time, loads.unit) for time in loads.stage_times(starts))
    bound = _seconds(loads.lower_bound, loads.unit)
    return Partition(stage_of, times, max(times), bound, loads.stage_bytes(starts))


def _device_loads(
    costs: CostGraph, devices: Sequence[DeviceSpec], order: Sequence[int]
) -> DeviceLoads:
    """Times and bytes of the nodes, in an order, on each device."""
    none = (0,) * len(order)
    fields = (costs.seconds, costs.parameter_nbytes or none, costs.nbytes or none)
    rows = [[values[node] for node in order] for values in fields]
    in_order = [
        device
        if device.seconds is None or len(device.seconds) != len(order)
        else replace(device, seconds=tuple(device.seconds[node] for node in order))
        for device in devices
    ]
    return DeviceLoads.of(in_order, rows[0], [int(p) for p in rows[1]], [int(a) for a in rows[2]])


def _dag(graph: CostGraph) -> tuple[Dag, Fraction]:
    """The graph in its `order()`, and the seconds of one unit of its costs."""
    order = graph.order()
    position = {node: at for at, node in enumerate(order)}
    seconds = [graph.seconds[node] for node in order]
    costs = to_integers("seconds", seconds)
    return Dag.of(costs, [(position[a], position[b]) for a, b in graph.edges]), unit_of(
        seconds, costs
    )


def _seconds(units: int, unit: Fraction) -> float:
    """Convert with correct rounding, which preserves the order of values."""
    return float(units * unit)


def _check_close(what: str, expected: float, found: float) -> None:
    if not math.isclose(expected, found, rel_tol=1e-9):
        raise VerifyError(f"{what} is wrong", expected=f"{expected!r} s", found=f"{found!r} s")
