"""Plan with measured steps: scale the cost model's times of ops to what stages really took.

A step measures whole actions, not ops. So what a stage's forward took is shared among its ops in
proportion to their estimated times, and likewise what its backward took (R, B and W together: what
is recomputed, and all gradients). Forward and backward are scaled separately, each stage by its own
two factors. With these times the estimate of each measured stage is its measured time.

An op that is much slower than its estimate makes its whole stage look slower, its neighbours
included. The next cut gives that stage fewer ops. So a pipeline that was planned with measured
steps remembers them, and its own profile is used together with these: the factors of all are
applied in turn, again and again, the newest last (iterative proportional fitting). Cuts at
different places tell a slow op from its neighbours, and the newest stages agree exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from autopipe.errors import OptionError, UnsupportedError
from autopipe.passes.cost import CallSeconds, PhaseSeconds, call_seconds, phase_seconds
from autopipe.passes.remat_policies import DEFAULT, parse_policy
from autopipe.passes.split import OpCosts, objective_of

from .stage_timers import StageTimer, modeled_timers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import fx

    from autopipe.passes.devices import Device
    from autopipe.passes.ir import Annotated, Phased, Split, StagePhases
    from autopipe.planning.measured_data import MeasuredData

NAME = "measured in steps"
"""What plans say of such times."""

MOST, ROUNDS = 8, 50
"""Profiles that are used together, at most; and how often their factors are applied."""


def check_model(measured: MeasuredData, annotated: Annotated, models: Sequence[Device]) -> None:
    """Check that measured steps are of a captured graph.

    Args:
        measured: the steps.
        annotated: the graph.
        models: of the devices to plan for.

    Raises:
        OptionError: nothing was measured, or another graph.
        UnsupportedError: the devices differ.
    """
    ran = _ran(measured)
    costs = OpCosts(annotated, objective_of(models, 1))
    here = {node.name for node in costs.ops}
    if ran != here:
        other = sorted(ran ^ here)
        raise OptionError(
            "`profile` was measured with another graph than the one to plan",
            expected="steps of the same model, in the same mode, with similar inputs",
            found=f"{len(other)} ops that only one of them has, such as {other[0]}",
        )
    if len(set(models)) > 1:
        raise UnsupportedError(
            "measured steps are planned with on one kind of device",
            found=" and ".join(dict.fromkeys(model.name for model in models)),
            remedy="plan by the table: device=[...], a name or a Device for each stage",
        )


@dataclass(frozen=True, eq=False)
class MeasuredCosts:
    """Times of a captured graph's ops, scaled to measured steps.

    Attributes:
        measured: the steps.
        annotated: the graph with estimated costs.
        device: the device model of the estimates.
    """

    measured: MeasuredData
    annotated: Annotated
    device: Device
    _cache: dict[int, Mapping[str, CallSeconds]] = field(default_factory=dict)

    def seconds(self, size: int) -> Mapping[str, CallSeconds]:
        """Times of all ops, by name.

        Args:
            size: samples in a micro-batch. Factors are those of the measured micro-batch size.
        """
        if size not in self._cache:
            factors = self._factors
            times = self._estimates(size)
            self._cache[size] = {
                name: CallSeconds(
                    time.forward * factors[name][0],
                    time.backward * factors[name][1],
                    time.recompute * factors[name][1],
                )
                for name, time in times.items()
            }
        return self._cache[size]

    def timers(
        self, split: Split, phased: Mapping[int, Phased], sizes: Sequence[int]
    ) -> tuple[StageTimer, ...]:
        """Timers for the stages of a cut: the device model's, scaled to the times of their ops.

        Args:
            split: the cut.
            phased: its phases, by micro-batch size.
            sizes: samples in each micro-batch.
        """
        size, K = max(sizes), len(split.stages)
        times = self.seconds(size)
        costs = OpCosts(split.annotated, objective_of((self.device,) * K, size, times=times))
        timers = []
        for k, timer in enumerate(modeled_timers((self.device,) * K)):
            ops = split.ops[k]
            whole = costs.seconds(self.device, phased[size].remat[k])
            forward = sum(times[node.name].forward for node in ops)
            rest = sum(whole[node] for node in ops) - forward
            scaled = _Scaled(self.device, phased[size].stages[k], forward, rest)
            timers.append(timer._replace(name=NAME, seconds=scaled.seconds, call_seconds=0.0))
        return tuple(timers)

    def _estimates(self, size: int) -> dict[str, CallSeconds]:
        """The cost model's times of all ops."""
        costs = self.annotated.costs
        distinct = {c: call_seconds(c, self.device, size) for c in set(costs.values())}
        return {name: distinct[cost] for name, cost in costs.items()}

    @cached_property
    def _factors(self) -> dict[str, tuple[float, float]]:
        """By op: measured over estimated time of its forward, and of the rest.

        What was not measured (a backward, by inference) has the factor of the forward. What has no
        estimate has the factor 1. Of the stages that compute an op, the first one counts.
        """
        ahead, later = (dict.fromkeys(self.annotated.costs, 1.0) for _ in "FB")
        every = [one for m in self.history for one in self._stages(m)]
        for _ in range(ROUNDS if len(self.history) > 1 else 1):
            for stage in every:
                for factors, estimate, seconds in (
                    (ahead, stage.forward, stage.forward_seconds),
                    (later, stage.rest, stage.rest_seconds),
                ):
                    if seconds is None:
                        continue
                    now = sum(factors[name] * estimate[name] for name in estimate)
                    for name in estimate if now else ():
                        factors[name] *= seconds / now
        inference = all(stage.rest_seconds is None for stage in every)
        return {name: (ahead[name], (ahead if inference else later)[name]) for name in ahead}

    @cached_property
    def history(self) -> list[MeasuredData]:
        """The steps and those that their plan was made with, oldest first."""
        found = [self.measured]
        while (earlier := found[-1].earlier) is not None and len(found) < MOST:
            found.append(earlier)
        return [m for m in reversed(found) if m is self.measured or _ran(m) == _ran(self.measured)]

    def _stages(self, measured: MeasuredData) -> Iterator[_MeasuredStage]:
        """What each stage took, and estimates of its ops; an op counts in its first stage."""
        size = max(measured.plan.sizes)
        times, seen = self._estimates(size), set[str]()
        costs = OpCosts(self.annotated, objective_of((self.device,), size))
        nodes: dict[str, fx.Node] = {node.name: node for node in costs.ops}
        policies = [parse_policy(stage.remat) or DEFAULT for stage in measured.plan.stages]
        stages = zip(measured.found.ops, measured.phase_seconds, policies, strict=True)
        for ops, phases, policy in stages:
            whole = costs.seconds(self.device, policy)
            own = [name for name in ops if name not in seen]
            seen.update(own)
            forward = {name: times[name].forward for name in own}
            rest = {name: whole[nodes[name]] - times[name].forward for name in own}
            later = [seconds for phase, seconds in phases.items() if phase != "F"]
            yield _MeasuredStage(forward, rest, phases["F"], sum(later) if later else None)


class _MeasuredStage(NamedTuple):
    """One measured stage.

    Attributes:
        forward, rest: by op, estimated seconds of F, and of R, B and W together.
        forward_seconds, rest_seconds: measured, of all ops; None: not measured.
    """

    forward: dict[str, float]
    rest: dict[str, float]
    forward_seconds: float
    rest_seconds: float | None


def _ran(measured: MeasuredData) -> set[str]:
    """Names of the captured ops that were measured."""
    return {name for ops in measured.found.ops for name in ops}


@dataclass(frozen=True, eq=False)
class _Scaled:
    """Scales the times of a traced stage's phases.

    Attributes:
        device: its model.
        largest: the stage, traced for the largest micro-batch.
        forward, rest: seconds of its F, and of R, B and W together.
    """

    device: Device
    largest: StagePhases
    forward: float
    rest: float

    def seconds(self, stage: StagePhases, in_flight: int) -> PhaseSeconds:
        """Times of the stage at any size of the micro-batch."""
        base, own = (phase_seconds(s, self.device) for s in (self.largest, stage))
        later = base.total - base.forward
        ahead = self.forward / base.forward if base.forward else 1.0
        back = self.rest / later if later else 1.0
        return PhaseSeconds(own.forward * ahead, *(seconds * back for seconds in own[1:]))
