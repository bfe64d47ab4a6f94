"""Options and a costed graph → the plan that is run; and what would help if none fits.

`compile` and `plan` come here with what they have captured. Where nothing is open the "search" has
one candidate; it is the same path.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from autopipe.errors import MemoryLimitError, PartitionError, UnsupportedError
from autopipe.passes.cost import CallSeconds
from autopipe.passes.devices import CPU_CORE, device_named_in_torch
from autopipe.passes.remat_policies import LADDER
from autopipe.planning.fitting import Candidate
from autopipe.planning.planner import clocks_of, plan
from autopipe.planning.profile_calls import Timing, device_name, profile
from autopipe.planning.profile_stages import measured_clocks
from autopipe.planning.search import Search, numbers_of_chunks
from autopipe.runtime.backends import backend_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from autopipe.options import Options
    from autopipe.passes.devices import Device
    from autopipe.passes.ir import Annotated, Split
    from autopipe.passes.phases import TraceCache
    from autopipe.planning.plans import Plan

REFINEMENTS = 3
"""How often a cut is made again with what its stages really took, where stages are timed."""


class Choice(NamedTuple):
    """A chosen plan.

    Attributes:
        plan: it.
        split: the stages.
        traces: what was traced of these stages; graphs of other candidates are not in it.
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
    """The best plan that keeps the options.

    Args:
        model: the user's module.
        annotated: its captured graph, costed.
        leaves: a call's flattened inputs.
        batch: its number of samples.
        options: checked; what is None is chosen.
        progress: told what is being done.

    Raises:
        MemoryLimitError: nothing fits; it says what would.
        PartitionError: the model has too few calls for so many stages.
        InputError: a batch norm would see a single value per channel.
    """
    search = _search(model, annotated, leaves, options, progress)
    try:
        chosen = search.best(batch)
        if options.profile:
            chosen = _refined(search, chosen, batch)
    except MemoryLimitError as error:
        remedies = list(_remedies(search, batch))
        raise MemoryLimitError(
            error.problem,
            expected=error.expected,
            found=error.found,
            remedy="; or ".join(remedies) or "nothing that was tried fits: use larger devices",
            missing_bytes=error.missing_bytes,
        ) from error
    traces = search.traced.restricted_to(chosen.phased.values())
    return Choice(chosen.plan, chosen.split, traces)


def models_of(devices: Sequence[torch.device]) -> tuple[Device, ...]:
    """Return the device model of each torch device: GPUs are recognized by their names."""
    return tuple(
        CPU_CORE if d.type == "cpu" else device_named_in_torch(backend_of(d).name(d))
        for d in devices
    )


def _search(
    model: nn.Module,
    annotated: Annotated,
    leaves: Sequence[Any],
    options: Options,
    progress: Callable[[str], None],
) -> Search:
    models = options.models or models_of(options.devices)
    if not options.profile:
        clocks = clocks_of(models)
        return Search(model, annotated, leaves, options, models, clocks, None, progress)
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
        nothing = Timing(0.0, 0.0)  # what is not run: sizes, the unpacking of results
        timings = {name: timed.get(name, nothing) for name in annotated.costs}
        return {
            name: CallSeconds(t.forward_seconds, t.backward_seconds, t.forward_seconds)
            for name, t in timings.items()
        }

    clocks = measured_clocks(options.devices, models)
    return Search(model, annotated, leaves, options, models, clocks, measured, progress)


def _refined(search: Search, chosen: Candidate, batch: int) -> Candidate:
    """Cut again with what stages took as a whole.

    Calls are timed one by one, with their arguments in the cache and nothing beside them. Stages,
    timed as they run, tell how far the sum of their calls is off; so much longer or shorter each of
    them is taken to be, and the cut is made again, as long as the step gets shorter.
    """
    known, asked = chosen.plan, search.options
    remat = asked.planned(known).remat
    search = replace(search, options=replace(asked, chunks=known.chunks, remat=remat))
    for _ in range(REFINEMENTS):
        assert search.measured is not None
        times = dict(search.measured(max(known.sizes)))
        for k, calls in enumerate(chosen.split.calls):
            share = chosen.plan.stages[k].seconds / max(chosen.split.estimates.seconds[k], 1e-12)
            times |= {n.name: CallSeconds(*(share * t for t in times[n.name])) for n in calls}
        search = replace(search, measured=_always(times))
        try:
            again = search.best(batch)
        except MemoryLimitError:
            break
        if again.plan.step_seconds >= chosen.plan.step_seconds:
            break
        chosen = again
    # The least of several measurements is too low: the cut that was chosen is timed once more.
    # Its plan is made with the options that were asked for: one micro-batch may be chosen, too.
    clocks = measured_clocks(asked.devices, search.models)
    timed = plan(search.model, chosen.split, chosen.phased, known.sizes, asked, clocks)
    return replace(chosen, plan=timed)


def _always(times: Mapping[str, CallSeconds]) -> Callable[[int], Mapping[str, CallSeconds]]:
    return lambda size: times


# ---------------------------------------------------------------------------- if nothing fits


def _remedies(search: Search, batch: int) -> Iterator[str]:
    """Changes that would fit, each the smallest of its kind, in words."""
    options = search.options
    leanest = LADDER[-1]
    if options.remat is not None and set(options.remat) != {leanest}:
        lean = replace(options, remat=(leanest,) * len(options.devices))
        if _fits(search, lean, batch):
            yield f'remat="{leanest.name}", or remat="auto"'
    if options.chunks is not None:
        for chunks in numbers_of_chunks(batch, len(options.devices)):
            if chunks > options.chunks and _fits(search, replace(options, chunks=chunks), batch):
                yield f"chunks={chunks}"
                break
    if (count := _devices(search, batch)) is not None:
        yield f"{count} devices"
    if (fewer := _batch(search, batch)) is not None:
        yield f"a batch of {fewer}"


def _fits(search: Search, options: Options, batch: int) -> bool:
    """Whether a plan with these options does."""
    # Where nothing is measured: only memory counts here.
    K = len(options.devices)
    models = search.models if len(search.models) == K else (search.models[0],) * K
    trying = replace(
        search, options=options, models=models, clocks=clocks_of(models), measured=None
    )
    try:
        return trying.fits(batch)
    except PartitionError:
        return False


def _devices(search: Search, batch: int) -> int | None:
    """The least number of such devices that would do, up to 8 times as many; by bisection."""
    options = search.options
    limits, device = options.limits, options.devices[0]
    if limits is None or len({*limits}) > 1 or len({d.type for d in options.devices}) > 1:
        return None
    if len(set(search.models)) > 1:
        return None
    K = len(options.devices)

    def fits(count: int) -> bool:
        remat = None if options.remat is None else (options.remat[0],) * count
        more = replace(
            options,
            devices=(device,) * count,
            limits=(limits[0],) * count,
            models=(search.models[0],) * count,
            remat=remat,
        )
        return _fits(search, more, batch)

    return _least(fits, K + 1, 8 * K)


def _batch(search: Search, batch: int) -> int | None:
    """The largest smaller batch that would do."""
    found = _least(lambda less: _fits(search, search.options, batch - less), 1, batch - 1)
    return None if found is None else batch - found


def _least(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number in a range that fits, if all above it do: doubled steps, then bisection."""
    step, below = 1, low - 1
    at = low
    while at <= high and not fits(at):
        below, at, step = at, min(at + step, high) if at < high else high + 1, step * 2
    if at > high:
        return None
    while at - below > 1:
        middle = (at + below) // 2
        if fits(middle):
            at = middle
        else:
            below = middle
    return at
