"""Compute a `Plan` from a split program and its phases. (`search` decides what to plan.)"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autopipe.passes.codegen import stage_messages
from autopipe.passes.cost import (
    PeakBytes,
    StageBytes,
    cost_of_stage,
    offloaded_bytes,
    peak_bytes,
    peak_saved_bytes,
    recomputes,
    shared_messages,
    stage_bytes,
)
from autopipe.passes.ir import InputKind, at_batch
from autopipe.passes.schedule import is_own, queue_sizes
from autopipe.passes.split import PlannedCut, modules_by_stage, planned_cut_of
from autopipe.planning.plan_notes import notes_of
from autopipe.planning.plan_parts import (
    EACH,
    ONCE,
    Crossing,
    DeviceTotal,
    DuplicatedCall,
    Segment,
    StagePlan,
    Times,
)
from autopipe.planning.plans import Plan
from autopipe.report.stages import BoundaryTensor
from autopipe.runtime.mailbox import queue_capacity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from autopipe.options import Options
    from autopipe.passes.ir import Phased, Route, Split, StageGraph, StagePhases
    from autopipe.passes.schedule import DeviceSchedule, Scheduled
    from autopipe.planning.stage_timers import StageTimer


def make_plan(
    model: nn.Module,
    split: Split,
    phased: Mapping[int, Phased],
    sizes: Sequence[int],
    options: Options,
    timers: Sequence[StageTimer],
) -> Plan:
    """Compute the plan of a split program for a sequence of micro-batch sizes.

    Args:
        model: what was captured.
        split: the stages.
        phased: their phases, by size.
        sizes: samples in each micro-batch.
        options: devices, limits, number of chunks and schedule.
        timers: one per stage.
    """
    K, planned = len(split.stages), planned_cut_of(split)
    distinct = sorted(set(sizes), reverse=True)
    order = options.order
    nbytes = {(k, s): _stage_bytes(phased[s], k, options) for k in range(K) for s in distinct}
    early = order.waiting([recomputes(stage) for stage in phased[distinct[0]].stages])
    scheduled = order.scheduled(len(sizes), early_recompute=early)
    in_flight = scheduled.in_flight()
    by_chunk = {(k, m): nbytes[k, s] for k in range(K) for m, s in enumerate(sizes)}
    modules = modules_by_stage(split)
    plan = Plan(
        model=type(model).__name__,
        training=model.training,
        whole=options.whole_batch,
        graph=planned.graph,
        schedule=order.name,
        actions=_actions(order, options.chunks or len(sizes)),
        devices=len(options.devices),
        chunks=options.chunks or len(sizes),
        sizes=tuple(sizes),
        totals=(),
        stages=tuple(
            _stage(
                split,
                stage,
                modules[stage.index],
                [phased[s] for s in distinct],
                [nbytes[stage.index, s] for s in distinct],
                timers[stage.index],
                options,
                in_flight[stage.index],
            )
            for stage in split.stages
        ),
        crossings=_crossings(split, phased[distinct[0]].stages, distinct[0]),
        segments=tuple(Segment(*run) for run in planned.runs),
        duplicated=tuple(DuplicatedCall(*one) for one in planned.duplicated),
        bound_seconds=split.estimates.lower_bound,
        cut_seconds=split.estimates.bottleneck,
        gather_seconds=_gather_seconds(split, sizes, timers),
        notes=notes_of(split, options),
    )
    capacity = _queue_capacity(split, phased[distinct[0]], scheduled)
    away = plan.away(scheduled)
    # On a CPU worker what is offloaded stays in the same memory.
    freed = [[o for o in row if timers[o.stage].host_seconds is not None] for row in away]
    peaks = peak_bytes(plan.timeline, K, sizes, nbytes, split.routes, capacity, freed)
    saved = peak_saved_bytes(scheduled, by_chunk, away)
    plan = _with_peaks(plan, peaks, saved, options.limits)
    plan.verify()
    return plan


def _crossings(split: Split, stages: Sequence[StagePhases], size: int) -> tuple[Crossing, ...]:
    lengths = {x.name: x.example for x in split.captured.lengths}
    routes = (r for r in split.routes.values() if r.consumers)
    return tuple(BoundaryTensor.of(r).at(size, lengths, _gradient(r, stages)) for r in routes)


def _gradient(route: Route, stages: Sequence[StagePhases]) -> str | None:
    """How often parts of a shared parameter's gradient are sent to its owner."""
    if route.kind != "parameter":
        return None
    if any(route.name in stages[k].sent_grads for k in route.consumers):
        return EACH
    return ONCE if any(route.name in stages[k].own_grads for k in route.consumers) else None


def _actions(order: DeviceSchedule, chunks: int) -> tuple[str, ...]:
    """What each device runs under a user's own schedule; nothing of one that has a name."""
    if not is_own(order.kind):
        return ()
    rows = order.kind.order(order.devices, chunks, order.virtual_stages)
    return tuple(" ".join(f"{x}{stage}.{m}" for x, stage, m in row) for row in rows)


def _queue_capacity(
    split: Split, phased: Phased, scheduled: Scheduled
) -> Callable[[int, int], int]:
    """(from, to) → messages of one kind that the runtime queues: as many as the order needs."""
    messages = [stage_messages(split, stage) for stage in phased.stages]
    largest: dict[tuple[int, int], int] = {}
    for queue, size in queue_sizes(scheduled, messages, queue_capacity).items():
        key = queue.source, queue.to
        largest[key] = max(size, largest.get(key, 0))
    return lambda source, to: largest.get((source, to), queue_capacity(source, to))


def _with_peaks(
    plan: Plan, peaks: PeakBytes, saved: PeakBytes, limits: Sequence[int] | None
) -> Plan:
    """The plan with its peaks; `limits` are per device."""
    homes = plan.order.homes
    stages = [
        replace(stage, peak_bytes=most, peak_saved_bytes=kept)
        for stage, most, kept in zip(plan.stages, peaks.stages, saved.stages, strict=True)
    ]
    totals = tuple(
        DeviceTotal(
            peak_saved_bytes=saved.devices[d],
            memory_bytes=peak
            + sum(s.static_bytes for home, s in zip(homes, stages, strict=True) if home == d),
            limit_bytes=None if limits is None else limits[d],
        )
        for d, peak in enumerate(peaks.devices)
    )
    for k, home in enumerate(homes):
        limit, used = totals[home].limit_bytes, totals[home].memory_bytes
        if limit is not None:
            left = max(0, limit - (used - stages[k].memory_bytes))
            stages[k] = replace(stages[k], limit_bytes=left)
    return replace(plan, stages=tuple(stages), totals=totals)


def _stage_bytes(phased: Phased, k: int, options: Options) -> StageBytes:
    messages = shared_messages(phased, options.stage_devices, k)
    nbytes = stage_bytes(phased.stages[k], messages)
    if phased.differentiated:
        away = offloaded_bytes(phased, options.stage_devices, k)
        return nbytes._replace(offloaded=away)
    # Inference saves nothing.
    return StageBytes(0, nbytes.forward, 0, 0, nbytes.received, {})


def planned_cut(plan: Plan) -> PlannedCut:
    """Return the plan's cut in the form that `split` uses."""
    runs = tuple((segment.call, segment.stage) for segment in plan.segments)
    duplicated = tuple((one.call, one.stages) for one in plan.duplicated)
    return PlannedCut(plan.graph, plan.starts, runs, duplicated)


def _stage(
    split: Split,
    stage: StageGraph,
    modules: str,
    phased: Sequence[Phased],
    nbytes: Sequence[StageBytes],
    timer: StageTimer,
    options: Options,
    in_flight: int,
) -> StagePlan:
    """Plan one stage; `phased` and `nbytes` are by size, the largest first."""
    k, size = stage.index, phased[0].size
    cost = cost_of_stage(split, stage, size)
    return StagePlan(
        first=split.firsts[stage.index],
        modules=modules or split.firsts[stage.index] or "none",
        calls=len(split.ops[k]),
        device=str(options.stage_devices[k]),
        speeds=timer.name,
        remat=phased[0].remat[k].name,
        parameters=tuple(i.target for i in stage.held if i.kind is InputKind.PARAMETER),
        flops=at_batch(cost.flops, size),
        times=tuple(
            _times(split, cut, k, timer, in_flight, own.offloaded)
            for cut, own in zip(phased, nbytes, strict=True)
        ),
        parameter_bytes=cost.parameter_bytes,
        gradient_bytes=cost.gradient_bytes,
        optimizer_bytes=cost.optimizer_bytes,
        buffer_bytes=sum(
            int(i.spec.nbytes) for i in stage.held if i.kind is not InputKind.PARAMETER
        ),
        shared_copy_bytes=cost.shared_copy_bytes,
        activation_bytes=at_batch(cost.activation_bytes, size),
        saved_bytes=max(own.saved for own in nbytes),
        offloaded_bytes=max(own.offloaded for own in nbytes),
        kept_bytes=sum(nbytes[0].sums.values()) if options.backend == "cudagraphs" else 0,
        in_flight=in_flight,
        peak_saved_bytes=0,
        peak_bytes=0,
        limit_bytes=None,
    )


def _times(
    split: Split, cut: Phased, k: int, timer: StageTimer, in_flight: int, offloaded: int
) -> Times:
    """Seconds of a micro-batch on a stage, and of transfers from and to the stage before it."""
    seconds = timer.seconds(cut.stages[k], in_flight)
    routes = [r for r in split.routes.values() if r.kind == "activation"]
    received = [
        r for r in routes if k in r.consumers and r.holders[r.holders.index(k) - 1] == k - 1
    ]
    returned = [r for r in received if r.name in cut.stages[k].sent_grads]

    def over(routes: Sequence[Route]) -> float:
        nbytes = [at_batch(r.spec.nbytes, cut.size) for r in routes]
        return timer.link.seconds(sum(nbytes)) if nbytes else 0.0

    issue = timer.call_seconds * timer.calls(cut.stages[k])
    away = timer.host_seconds(offloaded) if timer.host_seconds and offloaded else 0.0
    return Times(*seconds, over(received), over(returned), issue, away)


def _gather_seconds(split: Split, sizes: Sequence[int], timers: Sequence[StageTimer]) -> float:
    """Seconds to copy the micro-batches' results into one tensor."""
    if len(sizes) == 1:
        return 0.0
    parts = {
        o.name: at_batch(o.spec.nbytes, sum(sizes))
        for o in split.captured.outputs
        if o.combine.copies
    }
    return sum(
        timers[max(split.routes[n].source, 0)].copy_seconds(nbytes) for n, nbytes in parts.items()
    )
