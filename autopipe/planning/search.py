"""Choose cut, rematerialization and number of micro-batches together, judged by the simulator.

A candidate is a complete `Plan`, as for a run: stages are cut, traced, timed and simulated. Of the
candidates in which every stage stays within its memory limit, the one with the shortest predicted
step wins.

Numbers of micro-batches are tried in the order of a bound on their step time; those whose bound is
no better than the best plan found are not traced. `cut_trials` tries cuts for one number. Stages of
the best plan that are on its critical path then try finer fractions (`fitting`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from autopipe.cut_positions import cut_positions
from autopipe.errors import InputError, MemoryLimitError
from autopipe.passes.driver import cut_into_stages, phases_by_size
from autopipe.passes.phases import TraceCache, batch_norms, least_samples
from autopipe.passes.remat_policies import LADDER
from autopipe.passes.split import objective_of
from autopipe.planning.cut_trials import CutTrials, missing_or_inf, step_bound
from autopipe.planning.fitting import Candidate, FittedCut, refine_policies
from autopipe.planning.make_plan import make_plan
from autopipe.runtime import microbatch
from autopipe.tensor_meta import training_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from autopipe.options import Options
    from autopipe.passes.cost import CallSeconds
    from autopipe.passes.devices import Device
    from autopipe.passes.ir import Annotated, Phased, Split
    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.passes.split import Objective
    from autopipe.planning.stage_timers import StageTimer

    TimersOf = Callable[
        [Split, Mapping[int, Phased], Sequence[int]], tuple[StageTimer, ...]
    ]  # of a cut and its phases, for micro-batches of some sizes

BOUND_TOLERANCE = 0.9
"""A traced plan may be faster than the bound by per-op costs, down to this fraction of it."""

MOST_CHUNKS = 1024
"""The largest number of micro-batches that is tried."""

NORMALISED_TOGETHER = 8
"""Samples that batch norm in training normalises together, at least, where the planner chooses the
number of micro-batches, and memory allows it: its error grows fast below (Wu and He 2018,
"Group Normalization", figure 1)."""


@dataclass
class Search:
    """The space of plans for a model, and the inputs for their times and memory.

    Attributes:
        model: the user's module.
        annotated: its captured graph with costs.
        leaves: a call's flattened inputs.
        options: what the user fixed, and what is left to choose.
        models: a device model per stage, by which cuts are balanced.
        timers: one per stage, by which plans are timed.
        measured: returns measured times of the graph's ops, by name, for a micro-batch size; None:
            use the device models.
        progress: called with a text for each trial.
        timers_of: returns timers for the stages of a cut; None: `timers`.
        traces: what was traced so far.
    """

    model: nn.Module
    annotated: Annotated
    leaves: Sequence[Any]
    options: Options
    models: tuple[Device, ...]
    timers: tuple[StageTimer, ...]
    measured: Callable[[int], Mapping[str, CallSeconds]] | None = None
    progress: Callable[[str], None] = lambda text: None
    timers_of: TimersOf | None = None
    traces: TraceCache = field(default_factory=TraceCache)

    def best(self, batch: int) -> Candidate:
        """Find the plan with the shortest predicted step within the memory limits.

        Args:
            batch: number of samples.

        Raises:
            MemoryLimitError: no plan is within them.
            PartitionError: the model has too few ops for the number of stages.
            InputError: no number of micro-batches gives batch norms enough values.
        """
        best: tuple[FittedCut, Sequence[int]] | None = None
        failures: list[Exception] = []
        for chunks, bound in self._bounded_chunks(batch):
            if best is not None and bound * BOUND_TOLERANCE >= best[0].step_seconds:
                continue
            sizes = self.sizes(batch, chunks)
            fastest = math.inf if best is None else best[0].step_seconds
            try:
                found = CutTrials(self, sizes, fastest=fastest).best()
            except (MemoryLimitError, InputError) as error:
                failures.append(error)
                continue
            if found is not None and (best is None or found.step_seconds < best[0].step_seconds):
                best = found, sizes
        best = best or self._leanest(batch)  # may find a plan that the others miss
        if best is None:
            raise min(failures, key=missing_or_inf)
        if self.options.limits is None or self.options.remat is not None:
            return best[0].chosen
        return refine_policies(partial(self.candidate, best[0].chosen.split, best[1]), best[0])

    def fits(self, batch: int) -> bool:
        """Whether any plan is within the memory limits; those with least memory are tried first.

        Args:
            batch: number of samples.

        Raises:
            PartitionError: the model has too few ops for the number of stages.
        """
        return self._leanest(batch) is not None

    def candidate(
        self, split: Split, sizes: Sequence[int], remat: Sequence[RematPolicy]
    ) -> Candidate:
        """Plan a cut with a policy per stage.

        Args:
            split: the cut.
            sizes: samples in each micro-batch.
            remat: one policy per stage.
        """
        self.progress(f"trying {len(sizes)} micro-batches")
        options = self.options
        request = training_request(
            *(self.model, split, self.leaves, sizes, options.stage_devices, remat),
            exact=options.exact,
            kernels=options.stage_kernels,
        )
        phased = phases_by_size(request, self.traces)
        timers = self.timers if self.timers_of is None else self.timers_of(split, phased, sizes)
        plan = make_plan(self.model, split, phased, sizes, options, timers)
        return Candidate(plan, split, phased)

    def objective(self, sizes: Sequence[int], remat: Sequence[RematPolicy]) -> Objective:
        """Return the objective of a cut for these micro-batches, without memory limits.

        Args:
            sizes: samples in each micro-batch.
            remat: one policy per stage.
        """
        in_flight = self.options.order.scheduled(len(sizes)).in_flight()
        return objective_of(
            self.models,
            max(sizes),
            remat=remat,
            in_flight=in_flight,
            times=None if self.measured is None else self.measured(max(sizes)),
            cut_at=cut_positions(self.model, self.options.cut_at),
            exact=self.options.exact,
            homes=self.options.order.homes,
        )

    def sizes(self, batch: int, chunks: int) -> tuple[int, ...]:
        """Samples in each micro-batch: enough for batch norm.

        Args:
            batch: number of samples.
            chunks: number of micro-batches, at most.
        """
        return microbatch.sizes(batch, chunks, least_samples(self.annotated.captured, batch))

    def _leanest(self, batch: int) -> tuple[FittedCut, Sequence[int]] | None:
        """The first plan that fits and its micro-batches, those with least memory first."""
        chunks = self.options.chunks
        least = least_samples(self.annotated.captured, batch)
        K = len(self.options.devices)
        counts = chunk_counts(batch, K, least) if chunks is None else [chunks]
        for count in reversed(counts):
            sizes = self.sizes(batch, count)
            try:
                found = CutTrials(self, sizes, any_plan=True).best()
            except (MemoryLimitError, InputError):
                continue
            if found is not None:
                return found, sizes
        return None

    def _bounded_chunks(self, batch: int) -> Iterator[tuple[int, float]]:
        """Numbers of micro-batches to try, each with a bound on the step time, least first."""
        if self.options.chunks is not None:
            yield self.options.chunks, 0.0
            return
        bounds = []
        least = least_samples(self.annotated.captured, batch)
        if batch_norms(self.annotated.captured):
            least = max(least, min(batch, NORMALISED_TOGETHER))
        for chunks in chunk_counts(batch, len(self.options.devices), least):
            sizes = self.sizes(batch, chunks)
            remat = self.options.stage_remat or LADDER[:1] * len(self.models)
            split = cut_into_stages(self.annotated, self.objective(sizes, remat))
            bounds.append((step_bound(split, sizes), chunks))
        for bound, chunks in sorted(bounds):
            yield chunks, bound


def chunk_counts(batch: int, stages: int, least: int = 1) -> list[int]:
    """Return numbers of micro-batches worth trying: powers of two, these times K, and one sample.

    Of several that split the batch alike, only the smallest is returned.

    Args:
        batch: number of samples.
        stages: K.
        least: samples that a micro-batch needs.
    """
    powers = [2**i for i in range(MOST_CHUNKS.bit_length())]
    counts = sorted({n * f for n in powers for f in (1, stages)} | {batch})
    different = {microbatch.sizes(batch, n, least): n for n in reversed(counts)}
    return sorted(n for n in different.values() if n <= min(batch, MOST_CHUNKS))
