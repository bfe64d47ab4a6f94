"""Try cuts for one number of micro-batches and keep the fastest plan that fits.

The balanced cut, which ignores memory, is tried first; then cuts under the limits, which choose a
policy for each stage by estimate. For each cut, every stage gets the policy with least
recomputation among those with which its trace fits (`fitting`). The differences between traces and
estimates (`estimate_errors`) correct the next cut.

Cuts for tighter limits are tried too: estimates are not exact, and the largest stage alone does not
determine the step time. (Each limit is a little below the memory of the last plan, so that a plan
that is found with less memory is rarely missed with more.)
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from autopipe.errors import MemoryLimitError, PartitionError
from autopipe.passes.driver import cut_into_stages
from autopipe.passes.remat_policies import LADDER
from autopipe.passes.split import estimate_stages
from autopipe.planning.estimate_errors import corrections_for, underestimated_bytes
from autopipe.planning.fitting import FittedCut, fit_policies, memory_limit_error
from autopipe.planning.offloading import try_offloading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autopipe.options import Options
    from autopipe.passes.devices import Device
    from autopipe.passes.ir import Annotated, Split
    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.passes.split import Objective
    from autopipe.planning.fitting import Candidate

    StagePolicy = tuple[int, RematPolicy]

ESTIMATE_TOLERANCE = 0.85
"""A traced plan may be faster than the estimate for its cut, down to this fraction of it."""

RECUTS = 4
"""How often a cut under limits is repeated with corrected estimates."""

TIGHTER_CUTS, TIGHTER_CUTS_RECUTS, TIGHTER = 8, 2, 0.97
"""Tighter limits that are tried for a shorter step, recuts of each, and the next limit's fraction
of the last one, at most."""

WIDER = (1.1, 1.25, 1.5)
"""Fractions of the limits to cut for if nothing fits by the estimate, which may be too high."""


class SearchSpace(Protocol):
    """The part of `Search` that `CutTrials` uses."""

    annotated: Annotated
    options: Options
    models: tuple[Device, ...]

    def objective(self, sizes: Sequence[int], remat: Sequence[RematPolicy]) -> Objective:
        """The objective of a cut for these micro-batches, without memory limits."""

    def candidate(
        self, split: Split, sizes: Sequence[int], remat: Sequence[RematPolicy]
    ) -> Candidate:
        """The plan of a cut with a policy per stage."""


@dataclass
class CutTrials:
    """The cuts tried for one number of micro-batches.

    Attributes:
        search: model, options and device models.
        sizes: samples in each micro-batch.
        fastest: seconds of the fastest step found for other numbers of micro-batches; cuts that are
            unlikely to be faster are not traced.
        any_plan: stop at the first plan that fits; try the plan with least memory first.
    """

    search: SearchSpace
    sizes: Sequence[int]
    fastest: float = math.inf
    any_plan: bool = False
    _cuts: dict[Any, FittedCut] = field(default_factory=dict)
    _fitting: list[FittedCut] = field(default_factory=list)
    _failures: list[MemoryLimitError] = field(default_factory=list)
    _errors: dict[StagePolicy, int] = field(default_factory=dict)

    def best(self) -> FittedCut | None:
        """Find the fastest plan that fits.

        Returns:
            The plan; None if no traced plan fits and the others would not be faster.

        Raises:
            MemoryLimitError, PartitionError, InputError: there is no plan.
        """
        K, options = self._stages, self.search.options
        fixed, limits = options.stage_remat, options.stage_limits
        unlimited = self.search.objective(self.sizes, fixed or LADDER[:1] * K)

        def cut_within(remat: Sequence[Any], fraction: float, times: int) -> FittedCut | None:
            if limits is None or self._done:
                return None
            scaled = tuple(int(limit * fraction) for limit in limits)
            return self._recut(replace(unlimited, remat=tuple(remat), limits=scaled), times)

        if self.any_plan:
            cut_within(fixed or LADDER[-1:] * K, 1.0, RECUTS)
        if not self._done:
            balanced = cut_into_stages(self.search.annotated, unlimited)
            first = self._try(balanced, unlimited)
            if limits is not None:
                self._errors = underestimated_bytes(balanced, unlimited, first)
        found, fraction = cut_within(fixed or (LADDER,) * K, 1.0, RECUTS), 1.0
        for _ in range(TIGHTER_CUTS if self._fitting else 0):
            if found is None:
                break
            # Limits above what the last plan uses would give the same cut.
            fraction = min(fraction * TIGHTER, found.used_fraction)
            found = cut_within(fixed or (LADDER,) * K, fraction, TIGHTER_CUTS_RECUTS)
        if not self._fitting and not self.any_plan:
            cut_within(fixed or LADDER[-1:] * K, 1.0, RECUTS)
        best = min(self._fitting, key=lambda one: one.step_seconds, default=None)
        if best is None and self.fastest == math.inf:
            raise min(self._failures, key=missing_or_inf)
        return best

    @property
    def _stages(self) -> int:
        return len(self.search.models)

    @property
    def _done(self) -> bool:
        return self.any_plan and bool(self._fitting)

    def _recut(self, objective: Objective, times: int) -> FittedCut | None:
        """Cut under limits, repeatedly, with estimates corrected by the last cut's traces.

        Returns:
            The plans of the last cut; None if there is no cut, or none that could be faster.
        """
        errors = dict(self._errors)
        found: FittedCut | None = None
        for i in range(times):
            corrected = replace(objective, corrections=corrections_for(objective, errors))
            try:
                split = self._cut(corrected, () if i else WIDER)
            except PartitionError as error:
                self._failures.append(MemoryLimitError(error.problem, found=error.found))
                return None
            fastest = min([self.fastest, *(one.step_seconds for one in self._fitting)])
            if step_bound(split, self.sizes) * ESTIMATE_TOLERANCE >= fastest:
                return None
            found = self._try(split, corrected)
            if self._done:
                break
            new = underestimated_bytes(split, objective, found)
            if all(errors.get(at, -math.inf) >= nbytes for at, nbytes in new.items()):
                break
            errors |= {at: max(nbytes, errors.get(at, nbytes)) for at, nbytes in new.items()}
        return found

    def _cut(self, objective: Objective, wider: Sequence[float]) -> Split:
        """Cut for an objective; if there is no cut, for the first wider limits that have one."""
        annotated = self.search.annotated
        try:
            return cut_into_stages(annotated, objective)
        except PartitionError:
            for fraction in wider:
                scaled = tuple(None if n is None else int(n * fraction) for n in objective.limits)
                with suppress(PartitionError):
                    return cut_into_stages(annotated, replace(objective, limits=scaled))
            raise

    def _try(self, split: Split, objective: Objective) -> FittedCut:
        """Choose policies for a cut, unless that was done before, and record the result."""
        cut = tuple(stage.origins for stage in split.stages)
        if cut in self._cuts:
            return self._cuts[cut]
        fixed, limits = self.search.options.stage_remat, self.search.options.stage_limits
        ladders: list[tuple[RematPolicy, ...]] = (
            [LADDER] * self._stages if fixed is None else [(p,) for p in fixed]
        )
        wanted = replace(objective, remat=tuple(ladders), limits=limits or objective.limits)
        start = estimate_stages(split, wanted).remat
        if self.any_plan:
            start = tuple(ladder[-1] for ladder in ladders)
        make: Callable[[Sequence[RematPolicy]], Candidate] = partial(
            self.search.candidate, split, self.sizes
        )
        found = fit_policies(make, ladders, start, climb=not self.any_plan)
        if fixed is None and limits is not None:
            able = [model.host_link is not None for model in self.search.models]
            found = try_offloading(make, found, able)
        self._cuts[cut] = found
        if found.chosen.fits:
            self._fitting.append(found)
        else:
            self._failures.append(memory_limit_error(found.chosen.plan))
        return found


def step_bound(split: Split, sizes: Sequence[int]) -> float:
    """Return a bound on the seconds of a step by the estimates for a cut.

    (The slowest stage runs all micro-batches; each other stage runs at least one.)

    Args:
        split: the cut.
        sizes: samples in each micro-batch.
    """
    seconds = split.estimates.seconds
    return sum(seconds) + (sum(sizes) / max(sizes) - 1) * max(seconds)


def missing_or_inf(error: Exception) -> float:
    """Return how many bytes a failed plan is missing; infinity if the error does not say.

    Args:
        error: why there is no plan.
    """
    known = isinstance(error, MemoryLimitError) and error.missing_bytes is not None
    return error.missing_bytes if known else math.inf  # type: ignore[attr-defined]
