"""Choose the plan to run for options and a captured graph with costs.

`compile` and `plan` both call `choose`. If the user fixed everything, the search has a single
candidate.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from autopipe.errors import MemoryLimitError, UnsupportedError
from autopipe.passes.cost import CallSeconds
from autopipe.planning.make_plan import make_plan
from autopipe.planning.measured_costs import MeasuredCosts, check_model
from autopipe.planning.profile_cache import Timing
from autopipe.planning.profile_calls import device_name, profile
from autopipe.planning.profile_stages import measured_timers
from autopipe.planning.remedies import remedies
from autopipe.planning.schedules import fastest, schedules_to_try, why_not_early, with_note
from autopipe.planning.search import Search
from autopipe.planning.stage_timers import modeled_timers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from autopipe.options import Options
    from autopipe.passes.ir import Annotated, Split
    from autopipe.passes.phases import TraceCache
    from autopipe.passes.schedule import DeviceSchedule
    from autopipe.planning.fitting import Candidate
    from autopipe.planning.plans import Plan

REFINEMENTS = 3
"""How often a model is cut again with measured times of its stages."""


class Choice(NamedTuple):
    """A chosen plan.

    Attributes:
        plan: the plan.
        split: the stages.
        traces: the traces of these stages, without those of other candidates.
    """

    plan: Plan
    split: Split
    traces: TraceCache


def choose(
    model: nn.Module,
    annotated: Annotated,
    leaves: Sequence[Any],
    batch: int,
    options: Options,
    progress: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Find the best plan under the options.

    Args:
        model: the user's module.
        annotated: its captured graph with costs.
        leaves: a call's flattened inputs.
        batch: its number of samples.
        options: checked; options that are None are chosen.
        progress: called with a text for each step.

    Raises:
        MemoryLimitError: nothing fits; the error names changes that would fit.
        PartitionError: the model has too few ops for the number of stages.
        InputError: a batch norm would see a single value per channel.
    """
    if options.schedule is None:
        return _with_schedule(model, annotated, leaves, batch, options, progress)
    search = _search(model, annotated, leaves, options, progress)
    try:
        chosen = search.best(batch)
        if options.profile is True:
            chosen = _recut_by_measured_stages(search, chosen, batch)
    except MemoryLimitError as error:
        changes = list(remedies(search, batch))
        raise MemoryLimitError(
            error.problem,
            expected=error.expected,
            found=error.found,
            remedy="; or ".join(changes) or "nothing that was tried fits: use larger devices",
            missing_bytes=error.missing_bytes,
        ) from error
    traces = search.traces.restricted_to(chosen.phased.values())
    return Choice(chosen.plan, chosen.split, traces)


def _with_schedule(
    model: nn.Module,
    annotated: Annotated,
    leaves: Sequence[Any],
    batch: int,
    options: Options,
    progress: Callable[[str], None],
) -> Choice:
    """Find the best plan under the best schedule."""
    refusal = why_not_early(model, annotated.captured, batch)
    found: dict[DeviceSchedule, Choice] = {}

    def plan(order: DeviceSchedule) -> Plan:
        progress(f"trying schedule {order.name}")
        fixed = replace(options, schedule=order)
        found[order] = choose(model, annotated, leaves, batch, fixed, progress)
        return found[order].plan

    order, why = fastest(schedules_to_try(len(options.devices), early=refusal is None), plan)
    if refusal is not None:
        why += f"; others need the loss before the last forward has ended: {refusal}"
    return found[order]._replace(plan=with_note(found[order].plan, why))


def _search(
    model: nn.Module,
    annotated: Annotated,
    leaves: Sequence[Any],
    options: Options,
    progress: Callable[[str], None],
) -> Search:
    models, taken = options.stage_models, options.profile
    if not isinstance(taken, bool):
        check_model(taken, annotated, models)
        costs = MeasuredCosts(taken, annotated, models[0])
        timers = modeled_timers(models, options.backend)
        return Search(
            *(model, annotated, leaves, options, models, timers),
            costs.seconds,
            progress,
            costs.timers,
        )
    if not taken:
        timers = modeled_timers(models, options.backend)
        return Search(model, annotated, leaves, options, models, timers, None, progress)
    kinds = sorted({device_name(device) for device in options.devices})
    if len(kinds) > 1:
        raise UnsupportedError(
            "profile=True times a model's calls on one kind of device",
            found=" and ".join(kinds),
            remedy="plan by the table: device=[...], a name or a Device for each stage",
        )

    @cache
    def measured(size: int) -> Mapping[str, CallSeconds]:
        progress(f"timing calls on {size} samples")
        timed = profile(annotated, size, options.devices[0]).timings
        nothing = Timing(0.0, 0.0)  # for nodes that run nothing: sizes, unpacking of results
        timings = {name: timed.get(name, nothing) for name in annotated.costs}
        return {
            name: CallSeconds(t.forward_seconds, t.backward_seconds, t.forward_seconds)
            for name, t in timings.items()
        }

    timers = measured_timers(options.devices, options.stage_devices, models)
    return Search(model, annotated, leaves, options, models, timers, measured, progress)


def _recut_by_measured_stages(search: Search, chosen: Candidate, batch: int) -> Candidate:
    """Cut again with per-op times scaled by the measured times of whole stages.

    Ops are timed one by one, alone and with their arguments in the CPU cache. Stages are timed as
    in a step. The times of a stage's ops are scaled so that they sum to the stage's time, and the
    model is cut again with these, as long as the predicted step gets shorter.
    """
    first, asked = chosen.plan, search.options
    remat = asked.planned(first).remat
    search = replace(search, options=replace(asked, chunks=first.chunks, remat=remat))
    for _ in range(REFINEMENTS):
        assert search.measured is not None
        times = dict(search.measured(max(first.sizes)))
        for k, ops in enumerate(chosen.split.ops):
            factor = chosen.plan.stages[k].seconds / max(chosen.split.estimates.seconds[k], 1e-12)
            times |= {n.name: CallSeconds(*(factor * t for t in times[n.name])) for n in ops}
        search = replace(search, measured=_constant(times))
        try:
            again = search.best(batch)
        except MemoryLimitError:
            break
        if again.plan.step_seconds >= chosen.plan.step_seconds:
            break
        chosen = again
    # The smallest of several measurements is too low: time the chosen cut once more. Use the
    # user's options for its plan, because a single micro-batch may have been chosen.
    timers = measured_timers(asked.devices, asked.stage_devices, search.models)
    timed = make_plan(search.model, chosen.split, chosen.phased, first.sizes, asked, timers)
    return replace(chosen, plan=timed)


def _constant(times: Mapping[str, CallSeconds]) -> Callable[[int], Mapping[str, CallSeconds]]:
    return lambda size: times
