"""The joint choice: cut × rematerialization × micro-batches, judged by the simulator.

A candidate is a whole `Plan`, made as for a run: stages cut, traced, timed, played out. The least
predicted step time wins among those in which every stage keeps its limit.

For a number of micro-batches a few cuts are tried: the balanced one, without regard to memory, and
those under the limits, which choose a policy for each stage by estimate. On a cut each stage gets
the policy that makes least work among those with which it really fits (`fitting`). What the trace
shows of the estimate's error is told the next cut. Cuts for tighter limits are tried too: the
estimate is only one, and the largest stage is not all that a step takes. (Each is a little tighter
than what the last plan takes, so that what is found with less memory is seldom missed with more.)

Numbers of micro-batches come in the order of a bound on their step time, and those whose bound is
no better than the best plan found are not traced. In the best plan stages on the critical path then
try finer fractions.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from autopipe.errors import InputError, MemoryLimitError, PartitionError
from autopipe.passes.driver import cut_in_space, phases_by_size
from autopipe.passes.phases import TraceCache
from autopipe.passes.remat_policies import LADDER
from autopipe.passes.schedule import schedule
from autopipe.passes.split import estimate_stages, objective_of
from autopipe.planning.estimate_errors import missed_bytes, spread
from autopipe.planning.fitting import Candidate, Fitted, does_not_fit, fitted, refined
from autopipe.planning.planner import plan
from autopipe.runtime import microbatch
from autopipe.tensor_meta import training_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from autopipe.options import Options
    from autopipe.passes.cost import CallSeconds
    from autopipe.passes.devices import Device
    from autopipe.passes.ir import Annotated, Split
    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.passes.split import Objective
    from autopipe.planning.planner import Clock

SURE = 0.9
"""Of a bound that goes by the costs of calls: how far a traced plan may be below it."""

LIKELY = 0.85
"""Likewise of the estimate for a cut with its policies."""

RECUTS = 4
"""How often a cut under limits is made again with what the last one's stages really took."""

TIGHTER, LESS = 8, 0.97
"""How many tighter limits are tried as well, for a shorter step; the next one's share, at most."""

WIDER = (1.1, 1.25, 1.5)
"""Shares of the limits that are cut for if by the estimate nothing fits: it may be too high."""

MOST_CHUNKS = 1024
"""Micro-batches that are tried, if nobody says how many."""


@dataclass
class _Tried:
    """What was tried for a number of micro-batches."""

    sizes: Sequence[int]
    lean: bool
    beat: float
    cuts: dict[Any, Fitted] = field(default_factory=dict)
    found: list[Fitted] = field(default_factory=list)
    failures: list[MemoryLimitError] = field(default_factory=list)
    missed: dict[tuple[int, RematPolicy], int] = field(default_factory=dict)

    @property
    def enough(self) -> bool:
        """Whether it is known what was asked."""
        return self.lean and bool(self.found)

    @property
    def fastest(self) -> float:
        """Seconds of the shortest step that is known."""
        return min([self.beat, *map(_step, self.found)])

    @property
    def best(self) -> Fitted | None:
        """The plan with the shortest step."""
        return min(self.found, key=_step, default=None)


@dataclass
class Search:
    """What a choice is made among.

    Attributes:
        model: the user's module.
        annotated: its captured graph, costed.
        leaves: a call's flattened inputs.
        options: what is given, and what is open.
        models: a device model for each stage: what cuts are balanced by.
        clocks: what plans are timed by, one for each stage.
        measured: times of the graph's calls at a size of micro-batch, by name; None: the models'.
        progress: told what is being tried.
        traced: what is known of stages.
    """

    model: nn.Module
    annotated: Annotated
    leaves: Sequence[Any]
    options: Options
    models: tuple[Device, ...]
    clocks: tuple[Clock, ...]
    measured: Callable[[int], Mapping[str, CallSeconds]] | None = None
    progress: Callable[[str], None] = lambda text: None
    traced: TraceCache = field(default_factory=TraceCache)

    def best(self, batch: int) -> Candidate:
        """The plan with the least predicted step time that keeps the limits.

        Args:
            batch: samples.

        Raises:
            MemoryLimitError: none keeps them.
            PartitionError: the model has too few calls for so many stages.
            InputError: no number of micro-batches gives batch norms enough values.
        """
        best: tuple[Fitted, Sequence[int]] | None = None
        failures: list[Exception] = []
        for chunks, bound in self._numbers(batch):
            if best is not None and bound * SURE >= _step(best[0]):
                continue
            sizes = microbatch.sizes(batch, chunks)
            try:
                found = self._at(sizes, math.inf if best is None else _step(best[0]))
            except (MemoryLimitError, InputError) as error:
                failures.append(error)
                continue
            if found is not None and (best is None or _step(found) < _step(best[0])):
                best = found, sizes
        best = best or self._leanest(batch)  # which may find what the others miss
        if best is None:
            raise min(failures, key=_missing)
        if self.options.limits is None or self.options.remat is not None:
            return best[0].chosen
        return refined(partial(self._made, best[0].chosen.split, best[1]), best[0])

    def fits(self, batch: int) -> bool:
        """Whether `best` finds a plan: the leanest are tried first, the first that fits will do.

        Args:
            batch: samples.

        Raises:
            PartitionError: the model has too few calls for so many stages.
        """
        return self._leanest(batch) is not None

    def _leanest(self, batch: int) -> tuple[Fitted, Sequence[int]] | None:
        """A plan that fits, the leanest tried first, and its micro-batches; None: there is none."""
        chunks = self.options.chunks
        known = numbers_of_chunks(batch, len(self.models)) if chunks is None else [chunks]
        for number in reversed(known):
            sizes = microbatch.sizes(batch, number)
            try:
                found = self._at(sizes, lean=True)
            except (MemoryLimitError, InputError):
                continue
            if found is not None:
                return found, sizes
        return None

    def _at(
        self, sizes: Sequence[int], beat: float = math.inf, *, lean: bool = False
    ) -> Fitted | None:
        """The best plan for some micro-batches.

        Args:
            sizes: of the micro-batches.
            beat: seconds of a step; cuts that will hardly take less are not traced.
            lean: any plan that fits will do.

        Returns:
            The plan; None: none that was traced fits, and others would not be faster.

        Raises:
            MemoryLimitError, PartitionError, InputError: there is none.
        """
        K, given, limits = len(self.models), self.options.remat, self.options.limits
        tried = _Tried(sizes, lean, beat)
        free = self.objective(sizes, given or LADDER[:1] * K)

        def within(remat: Sequence[Any], share: float, times: int) -> Fitted | None:
            if limits is None or tried.enough:
                return None
            room = tuple(int(limit * share) for limit in limits)
            return self._within(replace(free, remat=tuple(remat), limits=room), tried, times)

        if lean:
            within(given or LADDER[-1:] * K, 1.0, RECUTS)
        if not tried.enough:
            balanced = cut_in_space(self.annotated, free)
            first = self._try(balanced, free, tried)
            tried.missed = missed_bytes(balanced, free, first) if limits is not None else {}
        found, share = within(given or (LADDER,) * K, 1.0, RECUTS), 1.0
        for _ in range(TIGHTER if tried.found else 0):
            if found is None:
                break
            share = min(share * LESS, _used(found))  # what is cut for limits between is this cut
            found = within(given or (LADDER,) * K, share, 2)
        if not tried.found and not lean:
            within(given or LADDER[-1:] * K, 1.0, RECUTS)
        if tried.best is None and beat == math.inf:
            raise min(tried.failures, key=_missing)
        return tried.best

    def _within(self, objective: Objective, tried: _Tried, times: int) -> Fitted | None:
        """Cut under limits, and again with what the last cut's stages really took.

        Returns:
            What came of the last cut; None: there is none, or none that could be faster.
        """
        missed = dict(tried.missed)
        found: Fitted | None = None
        for i in range(times):
            try:
                split = self._cut(
                    replace(objective, corrections=spread(objective, missed)), () if i else WIDER
                )
            except PartitionError as error:
                tried.failures.append(MemoryLimitError(error.problem, found=error.found))
                return None
            if _bound(split, tried.sizes) * LIKELY >= tried.fastest:
                return None
            found = self._try(
                split, replace(objective, corrections=spread(objective, missed)), tried
            )
            if tried.enough:
                break
            more = missed_bytes(split, objective, found)
            if all(missed.get(at, -math.inf) >= nbytes for at, nbytes in more.items()):
                break
            missed |= {at: max(nbytes, missed.get(at, nbytes)) for at, nbytes in more.items()}
        return found

    def _cut(self, objective: Objective, wider: Sequence[float]) -> Split:
        """The cut for an objective; if there is none, the one for the first wider limits."""
        try:
            return cut_in_space(self.annotated, objective)
        except PartitionError:
            for share in wider:
                room = tuple(None if n is None else int(n * share) for n in objective.limits)
                with suppress(PartitionError):
                    return cut_in_space(self.annotated, replace(objective, limits=room))
            raise

    def _try(self, split: Split, objective: Objective, tried: _Tried) -> Fitted:
        """Fit a cut, unless that was done, and note the outcome."""
        cut = tuple(stage.origins for stage in split.stages)
        if cut in tried.cuts:
            return tried.cuts[cut]
        K, given, limits = len(self.models), self.options.remat, self.options.limits
        ladders: list[tuple[RematPolicy, ...]] = (
            [LADDER] * K if given is None else [(p,) for p in given]
        )
        wanted = replace(objective, remat=tuple(ladders), limits=limits or objective.limits)
        start = estimate_stages(split, wanted).remat
        if tried.lean:
            start = tuple(ladder[-1] for ladder in ladders)
        make = partial(self._made, split, tried.sizes)
        found = tried.cuts[cut] = fitted(make, ladders, start, climb=not tried.lean)
        if found.chosen.fits:
            tried.found.append(found)
        else:
            tried.failures.append(does_not_fit(found.chosen.plan))
        return found

    def _made(self, split: Split, sizes: Sequence[int], remat: Sequence[RematPolicy]) -> Candidate:
        """The plan of a cut with a policy for each stage."""
        self.progress(f"trying {len(sizes)} micro-batches")
        options = self.options
        request = training_request(self.model, split, self.leaves, sizes, options.devices, remat)
        phased = phases_by_size(request, self.traced)
        return Candidate(
            plan(self.model, split, phased, sizes, options, self.clocks), split, phased
        )

    def objective(self, sizes: Sequence[int], remat: Sequence[RematPolicy]) -> Objective:
        """What a cut for these micro-batches is made for; without limits."""
        return objective_of(
            self.models,
            max(sizes),
            remat=remat,
            in_flight=schedule(self.options.kind, len(self.models), len(sizes)).in_flight(),
            times=None if self.measured is None else self.measured(max(sizes)),
        )

    def _numbers(self, batch: int) -> Iterator[tuple[int, float]]:
        """Numbers of micro-batches to try, each with a bound on the step time, least first."""
        if self.options.chunks is not None:
            yield self.options.chunks, 0.0
            return
        bounds = []
        for chunks in numbers_of_chunks(batch, len(self.models)):
            sizes = microbatch.sizes(batch, chunks)
            remat = self.options.remat or LADDER[:1] * len(self.models)
            split = cut_in_space(self.annotated, self.objective(sizes, remat))
            bounds.append((_bound(split, sizes), chunks))
        for bound, chunks in sorted(bounds):
            yield chunks, bound


def numbers_of_chunks(batch: int, stages: int) -> list[int]:
    """Numbers of micro-batches worth trying: powers of two, and these times K; all samples apart.

    Of several that cut the batch alike the least.
    """
    powers = [2**i for i in range(MOST_CHUNKS.bit_length())]
    numbers = sorted({n * f for n in powers for f in (1, stages)} | {batch})
    different = {microbatch.sizes(batch, n): n for n in reversed(numbers)}
    return sorted(n for n in different.values() if n <= min(batch, MOST_CHUNKS))


def _bound(split: Split, sizes: Sequence[int]) -> float:
    """Of a step, by the estimate for a cut.

    (Every stage takes its turn with some micro-batch, the slowest one with each.)
    """
    seconds = split.estimates.seconds
    return sum(seconds) + (sum(sizes) / max(sizes) - 1) * max(seconds)


def _step(found: Fitted) -> float:
    return found.chosen.plan.step_seconds


def _used(found: Fitted) -> float:
    """Of the limits, the largest share that a stage takes."""
    stages = found.chosen.plan.stages
    return max(s.memory_bytes / s.limit_bytes for s in stages if s.limit_bytes is not None)


def _missing(error: Exception) -> float:
    """How far a failure is from a plan that fits."""
    known = isinstance(error, MemoryLimitError) and error.missing_bytes is not None
    return error.missing_bytes if known else math.inf  # type: ignore[attr-defined]
