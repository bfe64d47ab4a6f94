"""The joint choice: cut × rematerialization × micro-batches, judged by the simulator.

A candidate is a whole `Plan`, made as for a run: stages cut, traced, timed, played out. The least
predicted step time wins among those in which every stage keeps its limit.

For a number of micro-batches a few cuts are tried (balanced without regard to memory; under the
limits, for stages that keep much or little). On a cut each stage starts with the policy that makes
least work and takes the next leaner one as long as it does not fit: what a stage keeps concerns its
own memory and time alone, so stages need not be tried in combination. Numbers of micro-batches come
in the order of a bound on their step time, and those whose bound is no better than the best plan
found are not traced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autopipe.errors import InputError, MemoryLimitError, PartitionError
from autopipe.passes.aim import Aim
from autopipe.passes.driver import cut_in_space
from autopipe.passes.phases import Traced
from autopipe.passes.schedule import schedule
from autopipe.planner import phases_of, plan
from autopipe.report.table import nbytes
from autopipe.runtime import microbatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from autopipe.options import Options
    from autopipe.passes.cost import Seconds
    from autopipe.passes.devices import Device
    from autopipe.passes.ir import Annotated
    from autopipe.passes.policies import Policy
    from autopipe.passes.staged import Phased, Split
    from autopipe.planner import Clock
    from autopipe.plans import Plan, StagePlan

LADDER: tuple[Policy, ...] = ("none", "min-cut", 0.75, 0.5, 0.25, "full")
"""Policies from the one that makes least work to the one that keeps least."""

SURE = 0.9
"""Of a bound that goes by the costs of calls: how far a traced plan may be below it."""

RECUTS = 4
"""How often a cut under limits is made again with what the last one's stages really took."""

MOST_CHUNKS = 1024
"""Micro-batches that are tried, if nobody says how many."""


@dataclass(frozen=True)
class Chosen:
    """A plan, with what it was made from."""

    plan: Plan
    split: Split
    phased: Mapping[int, Phased]


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
    measured: Callable[[int], Mapping[str, Seconds]] | None = None
    progress: Callable[[str], None] = lambda text: None
    traced: Traced = field(default_factory=Traced)

    def best(self, batch: int) -> Chosen:
        """The plan with the least predicted step time that keeps the limits.

        Args:
            batch: samples.

        Raises:
            MemoryLimitError: none keeps them.
            PartitionError: the model has too few calls for so many stages.
            InputError: no number of micro-batches gives batch norms enough values.
        """
        found: Chosen | None = None
        failures: list[Exception] = []
        for chunks, bound in self._numbers(batch):
            if found is not None and bound * SURE >= found.plan.step_seconds:
                continue
            try:
                made = self.at(batch, chunks)
            except (MemoryLimitError, InputError) as error:
                failures.append(error)
                continue
            if found is None or made.plan.step_seconds < found.plan.step_seconds:
                found = made
        if found is None:
            raise min(failures, key=_missing)
        return found

    def at(self, batch: int, chunks: int) -> Chosen:
        """The best plan for one number of micro-batches.

        Raises:
            MemoryLimitError, PartitionError, InputError: there is none.
        """
        sizes = microbatch.sizes(batch, chunks)
        K = len(self.models)
        given = self.options.remat
        found: list[Chosen] = []
        failures: list[MemoryLimitError] = []
        seen: set[Any] = set()
        aim = self.aim(sizes, given or ("none",) * K)
        self._try(cut_in_space(self.annotated, aim), sizes, seen, found, failures)
        if self.options.limits is not None:
            for policy in ("none", 0.5, "full"):
                remat = given or (policy,) * K
                self._within(self.aim(sizes, remat), sizes, seen, found, failures)
        if not found:
            raise min(failures, key=_missing)
        return min(found, key=lambda chosen: chosen.plan.step_seconds)

    def _within(
        self,
        aim: Aim,
        sizes: Sequence[int],
        seen: set[Any],
        found: list[Chosen],
        failures: list[MemoryLimitError],
    ) -> None:
        """Cut under the limits. Where a traced stage turns out larger than the cut's estimate, the
        next cut has so much less room there."""
        limits = self.options.limits
        assert limits is not None
        room = list(limits)
        for _ in range(RECUTS):
            try:
                split = cut_in_space(self.annotated, replace(aim, limits=tuple(room)))
            except PartitionError as error:
                failures.append(MemoryLimitError(error.problem, found=error.found))
                return
            made = self._try(split, sizes, seen, found, failures)
            if made is None or not any(map(missing_bytes, made.stages)):
                return
            stages = zip(made.stages, split.facts.nbytes, limits, strict=True)
            room = [
                max(0, min(r, limit - (stage.memory_bytes - estimate)))
                for r, (stage, estimate, limit) in zip(room, stages, strict=True)
            ]

    def _try(
        self,
        split: Split,
        sizes: Sequence[int],
        seen: set[Any],
        found: list[Chosen],
        failures: list[MemoryLimitError],
    ) -> Plan | None:
        """Fit a cut, note the outcome, return its plan; None if it was tried before."""
        cut = tuple(stage.origins for stage in split.stages)
        if cut in seen:
            return None
        seen.add(cut)
        chosen = self._fitted(split, sizes)
        if any(map(missing_bytes, chosen.plan.stages)):
            failures.append(_does_not_fit(chosen.plan))
        else:
            found.append(chosen)
        return chosen.plan

    def aim(self, sizes: Sequence[int], remat: Sequence[Policy]) -> Aim:
        """What a cut for these micro-batches is made for; without limits."""
        K = len(self.models)
        kind = self.options.schedule or "gpipe"
        return Aim(
            batch=max(sizes),
            devices=self.models,
            remat=tuple(remat),
            in_flight=schedule(kind, K, len(sizes)).in_flight(),
            limits=(None,) * K,
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
            remat = self.options.remat or ("none",) * len(self.models)
            split = cut_in_space(self.annotated, self.aim(sizes, remat))
            # Every stage takes its turn with some micro-batch, the slowest one with each.
            seconds = split.facts.seconds
            rest = sum(sizes) / max(sizes) - 1
            bounds.append((sum(seconds) + rest * max(seconds), chunks))
        for bound, chunks in sorted(bounds):
            yield chunks, bound

    def _fitted(self, split: Split, sizes: Sequence[int]) -> Chosen:
        """The plan of a cut whose stages make no more work than they must in order to fit.

        A stage that does not fit whatever it keeps is left at its leanest.
        """
        ladders = [LADDER] * len(split.stages)
        if self.options.remat is not None:
            ladders = [(policy,) for policy in self.options.remat]
        steps = [0] * len(split.stages)
        while True:
            remat = [ladder[i] for ladder, i in zip(ladders, steps, strict=True)]
            self.progress(f"trying {len(sizes)} micro-batches")
            phased = phases_of(
                self.model, split, self.leaves, sizes, self.options, remat, self.traced
            )
            made = plan(self.model, split, phased, sizes, self.options, self.clocks)
            large = [k for k, s in enumerate(made.stages) if missing_bytes(s) > 0]
            leaner = [k for k in large if steps[k] + 1 < len(ladders[k])]
            if not leaner:
                return Chosen(made, split, phased)
            for k in leaner:
                steps[k] += 1


def numbers_of_chunks(batch: int, stages: int) -> list[int]:
    """Numbers of micro-batches worth trying: powers of two, and these times K; all samples apart.

    Of several that cut the batch alike the least.
    """
    powers = [2**i for i in range(MOST_CHUNKS.bit_length())]
    numbers = sorted({n * f for n in powers for f in (1, stages)} | {batch})
    different = {microbatch.sizes(batch, n): n for n in reversed(numbers)}
    return sorted(n for n in different.values() if n <= min(batch, MOST_CHUNKS))


def missing_bytes(stage: StagePlan) -> int:
    """By how much a planned stage is above its limit; 0 if it fits, or has none."""
    return 0 if stage.limit_bytes is None else max(0, stage.memory_bytes - stage.limit_bytes)


def _does_not_fit(made: Plan) -> MemoryLimitError:
    k, stage = max(enumerate(made.stages), key=lambda one: missing_bytes(one[1]))
    assert stage.limit_bytes is not None
    return MemoryLimitError(
        f"stage {k} does not fit its device: {nbytes(missing_bytes(stage))} are missing",
        expected=f"at most {nbytes(stage.limit_bytes)}",
        found=f"{nbytes(stage.memory_bytes)}: parameters, optimizer and buffers"
        f" {nbytes(stage.static_bytes)}; gradients and {len(made.sizes)} micro-batches of"
        f" {max(made.sizes)} with remat {stage.remat} {nbytes(stage.peak_bytes)}",
        missing_bytes=missing_bytes(stage),
    )


def _missing(error: Exception) -> float:
    """How far a failure is from a plan that fits."""
    known = isinstance(error, MemoryLimitError) and error.missing_bytes is not None
    return error.missing_bytes if known else math.inf  # type: ignore[attr-defined]
