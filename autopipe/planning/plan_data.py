"""The data of a plan, and what is computed from them: timeline, balance, bytes sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from autopipe.passes.remat_policies import parse_policy
from autopipe.passes.schedule import (
    DeviceSchedule,
    Offload,
    Scheduled,
    Timeline,
    offloads,
    schedule_for,
    schedule_of_rows,
    scheduled_from_lists,
    simulate_actions,
)
from autopipe.planning.plan_parts import (
    Crossing,
    DeviceTotal,
    DuplicatedCall,
    Segment,
    StagePlan,
    Times,
)
from autopipe.typed_json import json_name

Duration = Callable[[str, int, int], float]

IDLE = 0.1
"""A stage with less than this fraction of the largest stage's time wastes its device."""


@dataclass(frozen=True)
class PlanData:
    """The data of a plan.

    Attributes:
        model: class name of the model.
        training: the mode that it was captured in.
        whole: planned for one micro-batch that is the whole batch; its samples may depend on one
            another.
        graph: fingerprint of the captured graph.
        schedule: name of the schedule.
        actions: of a schedule of the user's own, for each device what it runs, separated by spaces;
            empty for a kind that has a name.
        devices: K, their number; a schedule may put several stages on each.
        chunks: M, the number of micro-batches of a batch that is large enough.
        sizes: samples in each micro-batch of the batch that was planned for.
        stages: the stages.
        totals: for each device what its stages need together.
        crossings: the tensors that stages receive from the caller and from one another.
        segments: the ops of each stage, as runs of the captured order; empty if each stage is a
            single run.
        duplicated: the ops that several stages compute.
        bound_seconds: lower bound of the largest stage's time over all cuts of this model, by the
            costs that the cut is based on; None: not computed.
        cut_seconds: the largest stage's time by the same costs; None: not computed.
        gather_seconds: time to concatenate the micro-batches' results for the caller.
        notes: the capture's notes for the user.
    """

    model: str
    training: bool
    whole: bool
    graph: str
    schedule: str
    actions: tuple[str, ...]
    devices: int
    chunks: int
    sizes: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    totals: tuple[DeviceTotal, ...]
    crossings: tuple[Crossing, ...]
    segments: tuple[Segment, ...] = field(metadata=json_name("begins"))
    duplicated: tuple[DuplicatedCall, ...] = field(metadata=json_name("repeated"))
    bound_seconds: float | None
    cut_seconds: float | None
    gather_seconds: float
    notes: tuple[str, ...]

    @property
    def starts(self) -> tuple[str, ...]:
        """The first op of each stage except the first."""
        return tuple(s.first for s in self.stages[1:] if s.first is not None)

    @property
    def remat(self) -> str:
        """The stages' policies as text: ``full``, or ``full in 2, none in 1`` where they differ."""
        count = Counter(s.remat for s in self.stages)
        if len(count) == 1:
            return self.stages[0].remat
        return ", ".join(f"{policy} in {n}" for policy, n in count.items())

    @cached_property
    def order(self) -> DeviceSchedule:
        """The schedule, for any number of micro-batches."""
        if self.actions:
            rows = [row.split() for row in self.actions]
            return schedule_of_rows(scheduled_from_lists(self.schedule, rows))
        v = len(self.stages) // self.devices
        return schedule_for(self.schedule, self.devices, v)

    @cached_property
    def timeline(self) -> Timeline:
        """The simulated timeline of one training step, in seconds."""
        return self.simulated(
            self.order.scheduled(len(self.sizes), early_recompute=self.recomputes_early)
        )

    def simulated(self, scheduled: Scheduled, measured: Duration | None = None) -> Timeline:
        """The simulated timeline of a schedule of these stages and micro-batches, in seconds.

        Args:
            scheduled: the schedule.
            measured: seconds of an action, from phase, stage and micro-batch; None: by `stages`.
        """
        order = {size: i for i, size in enumerate(sorted(set(self.sizes), reverse=True))}

        def times(stage: int, m: int) -> Times:
            return self.stages[stage].times[order[self.sizes[m]]]

        def duration(phase: str, stage: int, m: int) -> float:
            t = times(stage, m)
            seconds = {"F": t.forward, "R": t.recompute, "B": t.backward, "W": t.weight}
            return sum(seconds[letter] for letter in phase)

        def delay(letter: str, source: int, to: int, m: int) -> float:
            return times(to, m).receive if letter == "F" else times(source, m).send_gradients

        def copy(stage: int, m: int) -> float:
            return times(stage, m).offload

        away = self.away(scheduled)
        return simulate_actions(scheduled, measured or duration, delay, away, copy)

    def away(self, scheduled: Scheduled) -> tuple[tuple[Offload, ...], ...]:
        """What each device offloads to the host under a schedule of these stages.

        Args:
            scheduled: the schedule.

        Returns:
            As `offloads`; () if no stage's policy offloads.
        """
        policies = {s.remat: parse_policy(s.remat) for s in self.stages}
        offloading = {name for name, p in policies.items() if p and p.least_offloaded is not None}
        stages = {k for k, s in enumerate(self.stages) if s.remat in offloading}
        return offloads(scheduled, stages) if stages else ()

    @cached_property
    def offload_counts(self) -> Counter[int]:
        """Stage → how many of its micro-batches wait on the host in a step."""
        return Counter(c.stage for row in self.timeline.copies for c in row if c.out)

    @property
    def recomputes_early(self) -> tuple[int, ...]:
        """The stages that recompute while they wait for a gradient from another device."""
        return self.order.waiting([any(t.recompute for t in s.times) for s in self.stages])

    @property
    def step_seconds(self) -> float:
        """Predicted time of one training step, without the optimizer's.

        It is that of the devices, or of the process that issues their work, whichever is longer.
        """
        return max(self.timeline.makespan, self.issue_seconds) + self.gather_seconds

    @cached_property
    def issue_seconds(self) -> float:
        """Time in which one process issues all operator calls of a step; 0: not known."""
        distinct = sorted(set(self.sizes), reverse=True)
        count = Counter(self.sizes)
        return sum(
            count[size] * stage.times[i].issue
            for stage in self.stages
            for i, size in enumerate(distinct)
        )

    @property
    def launch_bound(self) -> bool:
        """Whether issuing the operator calls takes longer than the devices need for them."""
        return self.issue_seconds > self.timeline.makespan

    @property
    def balance(self) -> float:
        """Mean over largest time of a device's stages, from 0 to 1 (perfectly balanced)."""
        seconds = self.device_seconds
        return sum(seconds) / len(seconds) / max(seconds) if max(seconds) else 1.0

    @property
    def gap(self) -> float | None:
        """How much the largest stage may exceed the lower bound, as a fraction of the bound."""
        if self.bound_seconds is None or self.cut_seconds is None:
            return None
        return self.cut_seconds / self.bound_seconds - 1 if self.bound_seconds else 0.0

    @property
    def digits(self) -> int:
        """Significant digits that the times deserve: 3 if all were measured, else 2."""
        return 3 if all(s.speeds.startswith("measured") for s in self.stages) else 2

    @property
    def advice(self) -> tuple[str, ...]:
        """What to change where devices are idle, or wait for the process that issues their work."""
        bound = (
            "the step is bound by launches: one process issues the operator calls of all devices;"
            ' use larger micro-batches (fewer chunks), backend="cudagraphs", or several processes'
        )
        return (*self._idle_advice, *((bound,) if self.launch_bound else ()))

    @property
    def _idle_advice(self) -> tuple[str, ...]:
        """What to change where stages have little work beside the largest."""
        most = max(self.device_seconds)
        idle_devices = [d for d, s in enumerate(self.device_seconds) if s < IDLE * most]
        idle = [k for k, home in enumerate(self.order.homes) if home in idle_devices]
        if not idle:
            return ()
        named = f"stage{'s' * (len(idle) > 1)} {', '.join(map(str, idle))}"
        works = "work" if len(idle) > 1 else "works"
        return (
            f"{named} {works} less than {IDLE:.0%} as long as the largest stage: use fewer devices"
            f" ({self.devices - len(idle_devices)})",
        )

    def received_bytes(self, k: int) -> int:
        """Bytes of the tensors that stage k receives with each micro-batch."""
        return self._traffic.received[k]

    def sent_bytes(self, k: int) -> int:
        """Bytes that stage k sends with each micro-batch; a tensor counts once per receiver."""
        return self._traffic.sent[k]

    def boundary_bytes(self, k: int) -> int:
        """Bytes of the tensors that stage k sends, each once, shared parameters included."""
        return self._traffic.leaving[k]

    def share_of_work(self, k: int) -> float | None:
        """Stage k's share of the predicted time of all stages; None if that is 0."""
        return self.stages[k].seconds / self._work if self._work else None

    @cached_property
    def device_seconds(self) -> list[float]:
        """For each device the `seconds` of its stages together."""
        seconds = [0.0] * self.devices
        for home, stage in zip(self.order.homes, self.stages, strict=True):
            seconds[home] += stage.seconds
        return seconds

    @cached_property
    def _work(self) -> float:
        return sum(s.seconds for s in self.stages)

    @cached_property
    def _traffic(self) -> _Traffic:
        """Bytes by stage, counted in one pass: a plan may have thousands of crossings."""
        found = _Traffic(Counter(), Counter(), Counter())
        for c in self.crossings:
            if c.source is not None:
                found.leaving[c.source] += c.nbytes
            if c.kind == "parameter":
                continue
            for k in set(c.targets):
                found.received[k] += c.nbytes
            if c.source is not None:
                found.sent[c.source] += c.nbytes * len(c.targets)
        return found


class _Traffic(NamedTuple):
    received: Counter[int]
    sent: Counter[int]
    leaving: Counter[int]
