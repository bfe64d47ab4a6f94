"""Find changes that would help if no plan fits the memory limits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autopipe.errors import PartitionError
from autopipe.passes.phases import least_samples
from autopipe.passes.remat_policies import LADDER
from autopipe.planning.search import chunk_counts
from autopipe.planning.stage_timers import modeled_timers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autopipe.options import Options
    from autopipe.planning.search import Search


def remedies(search: Search, batch: int) -> Iterator[str]:
    """Find changes of the options with which a plan fits, the smallest of each kind.

    Args:
        search: a search under whose options nothing fits.
        batch: number of samples.

    Returns:
        The changes in words: policies, micro-batches, devices, batch size.
    """
    options = search.options
    leanest = LADDER[-1]
    if options.remat is not None and set(options.remat) != {leanest}:
        lean = replace(options, remat=(leanest,) * options.order.stages)
        if _fits(search, lean, batch):
            yield f'remat="{leanest.name}", or remat="auto"'
    if options.chunks is not None:
        least = least_samples(search.annotated.captured, batch)
        for chunks in chunk_counts(batch, len(options.devices), least):
            if chunks > options.chunks and _fits(search, replace(options, chunks=chunks), batch):
                yield f"chunks={chunks}"
                break
    if (count := _more_devices(search, batch)) is not None:
        yield f"{count} devices"
    if (fewer := _smaller_batch(search, batch)) is not None:
        yield f"a batch of {fewer}"


def _fits(search: Search, options: Options, batch: int) -> bool:
    """Whether a plan with these options fits; nothing is measured, because only memory counts."""
    K = options.order.stages
    models = search.models if len(search.models) == K else (search.models[0],) * K
    timers = modeled_timers(models)
    trying = replace(
        search, options=options, models=models, timers=timers, measured=None, timers_of=None
    )
    try:
        return trying.fits(batch)
    except PartitionError:
        return False


def _more_devices(search: Search, batch: int) -> int | None:
    """The smallest number of equal devices with which a plan fits, up to 8 times as many."""
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
            schedule=replace(options.order, devices=count),
            limits=(limits[0],) * count,
            models=(search.models[0],) * count,
            remat=remat,
        )
        return _fits(search, more, batch)

    return _smallest(fits, K + 1, 8 * K)


def _smaller_batch(search: Search, batch: int) -> int | None:
    """The largest smaller batch with which a plan fits."""
    found = _smallest(lambda less: _fits(search, search.options, batch - less), 1, batch - 1)
    return None if found is None else batch - found


def _smallest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number of a range that fits, if all larger ones do: double, then bisect."""
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
