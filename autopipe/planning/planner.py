"""Split and phases → `Plan`: what each stage does, in numbers. (What to plan, `search` chooses.)"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from autopipe.passes.cost import (
    PhaseSeconds,
    StageBytes,
    cost_of_stage,
    phase_seconds,
    stage_bytes,
    stage_peak_bytes,
)
from autopipe.passes.ir import InputKind, at_batch
from autopipe.passes.schedule import schedule
from autopipe.passes.split import PlannedCut, planned_cut_of
from autopipe.planning.plan_parts import DuplicatedCall, Segment, StagePlan, Times
from autopipe.planning.plans import Plan
from autopipe.report.stages import BoundaryTensor
from autopipe.runtime.mailbox import queue_capacity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from autopipe.options import Options
    from autopipe.passes.devices import Device, Link
    from autopipe.passes.ir import Phased, Route, Split, StageGraph, StagePhases


class Clock(NamedTuple):
    """How long a traced stage's phases take.

    Attributes:
        name: whose times these are.
        link: what its values are received over.
        seconds: of a stage's phases, where so many micro-batches are in flight.
        copying: so many bytes.
    """

    name: str
    link: Link
    seconds: Callable[[StagePhases, int], PhaseSeconds]
    copying: Callable[[int], float]


def clocks_of(models: Sequence[Device]) -> tuple[Clock, ...]:
    """The clocks of devices as they stand in the table, one for each stage."""

    def clock(model: Device) -> Clock:
        return Clock(
            model.name,
            model.link,
            lambda stage, in_flight: phase_seconds(stage, model),
            lambda nbytes: model.seconds(0, 2 * nbytes, "memory", "fp32"),
        )

    known = {id(model): clock(model) for model in models}
    return tuple(known[id(model)] for model in models)


def plan(
    model: nn.Module,
    split: Split,
    phased: Mapping[int, Phased],
    sizes: Sequence[int],
    options: Options,
    clocks: Sequence[Clock],
) -> Plan:
    """The plan of a split program for a sequence of micro-batch sizes.

    Args:
        model: what was captured.
        split: the stages.
        phased: their phases, by size.
        sizes: samples in each micro-batch.
        options: devices, limits, number of chunks and schedule.
        clocks: one for each stage.
    """
    K, planned = len(split.stages), planned_cut_of(split)
    distinct = sorted(set(sizes), reverse=True)
    in_flight = schedule(options.kind, K, len(sizes)).in_flight()
    nbytes = {(k, s): stage_bytes(phased[s].stages[k]) for k in range(K) for s in distinct}
    trained = phased[distinct[0]].differentiated
    if not trained:  # inference keeps nothing
        nbytes = {
            at: n._replace(saved=0, first_backward=0, backward=0, tangents={})
            for at, n in nbytes.items()
        }
    made = Plan(
        model=type(model).__name__,
        training=model.training,
        whole=options.whole,
        graph=planned.graph,
        schedule=options.kind,
        chunks=options.chunks or len(sizes),
        sizes=tuple(sizes),
        stages=tuple(
            _stage(
                split,
                stage,
                [phased[s] for s in distinct],
                [nbytes[stage.index, s] for s in sizes],
                clocks[stage.index],
                options,
                in_flight[stage.index],
            )
            for stage in split.stages
        ),
        crossings=tuple(
            BoundaryTensor.of(r).at(distinct[0]) for r in split.routes.values() if r.consumers
        ),
        segments=tuple(Segment(*run) for run in planned.runs),
        duplicated=tuple(DuplicatedCall(*one) for one in planned.duplicated),
        bound_seconds=split.estimates.lower_bound,
        cut_seconds=split.estimates.bottleneck,
        gather_seconds=_gathering(split, sizes, clocks),
        notes=split.captured.notes,
    )
    peaks = stage_peak_bytes(made.timeline, K, sizes, nbytes, split.routes, queue_capacity)
    stages = zip(made.stages, peaks, strict=True)
    made = replace(made, stages=tuple(replace(s, peak_bytes=peak) for s, peak in stages))
    made.verify()
    return made


def cut_of(plan: Plan) -> PlannedCut:
    """What has a plan's cut made again."""
    runs = tuple((segment.call, segment.stage) for segment in plan.segments)
    repeated = tuple((one.call, one.stages) for one in plan.duplicated)
    return PlannedCut(plan.graph, plan.starts, runs, repeated)


def _stage(
    split: Split,
    stage: StageGraph,
    phased: Sequence[Phased],
    nbytes: Sequence[StageBytes],
    clock: Clock,
    options: Options,
    in_flight: int,
) -> StagePlan:
    """One stage; `phased` by size, the largest first, `nbytes` by micro-batch."""
    k, size = stage.index, phased[0].size
    calls = split.calls[k]
    cost = cost_of_stage(split, stage, size)
    saved = [n.saved for n in nbytes]
    return StagePlan(
        first=split.firsts[stage.index],
        calls=len(calls),
        device=str(options.devices[k]),
        speeds=clock.name,
        remat=phased[0].remat[k].name,
        parameters=tuple(i.target for i in stage.held if i.kind is InputKind.PARAMETER),
        flops=at_batch(cost.flops, size),
        times=tuple(_times(split, cut, k, clock, in_flight) for cut in phased),
        parameter_bytes=cost.parameter_bytes,
        gradient_bytes=cost.gradient_bytes,
        optimizer_bytes=cost.optimizer_bytes,
        buffer_bytes=sum(
            int(i.spec.nbytes) for i in stage.held if i.kind is not InputKind.PARAMETER
        ),
        shared_copy_bytes=cost.lent_bytes,
        activation_bytes=at_batch(cost.activation_bytes, size),
        saved_bytes=max(saved),
        in_flight=in_flight,
        peak_saved_bytes=max(
            sum(saved[m : m + in_flight]) for m in range(len(saved) - in_flight + 1)
        ),
        peak_bytes=0,
        limit_bytes=None if options.limits is None else options.limits[k],
    )


def _times(split: Split, cut: Phased, k: int, clock: Clock, in_flight: int) -> Times:
    """Seconds of a micro-batch at a stage, with the transfers over its left boundary."""
    seconds = clock.seconds(cut.stages[k], in_flight)
    routes = [r for r in split.routes.values() if r.kind == "activation"]
    came = [r for r in routes if k in r.consumers and r.holders[r.holders.index(k) - 1] == k - 1]
    back = [r for r in came if r.name in cut.stages[k].sent_grads]

    def over(routes: Sequence[Route]) -> float:
        nbytes = [at_batch(r.spec.nbytes, cut.size) for r in routes]
        return clock.link.seconds(sum(nbytes)) if nbytes else 0.0

    return Times(*seconds, receive=over(came), send_gradients=over(back))


def _gathering(split: Split, sizes: Sequence[int], clocks: Sequence[Clock]) -> float:
    """Seconds to copy the results that come in parts, one for each micro-batch, into one."""
    if len(sizes) == 1:
        return 0.0
    parts = {
        o.name: at_batch(o.spec.nbytes, sum(sizes))
        for o in split.captured.outputs
        if o.combine.copies
    }
    return sum(
        clocks[max(split.routes[n].source, 0)].copying(nbytes) for n, nbytes in parts.items()
    )
