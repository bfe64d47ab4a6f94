"""`DeviceSchedule`: a kind of schedule for K devices, before the number of micro-batches is known.

It says how many stages there are and on which device each one is, which does not depend on the
number of micro-batches, and gives the `Scheduled` of any number of them. The kind gives the order;
rematerialization is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

from autopipe.errors import OptionError

from .actions import Action, Scheduled
from .schedule_kind import Order, ScheduleKind


@dataclass(frozen=True)
class DeviceSchedule:
    """A kind of schedule for K devices.

    Attributes:
        kind: gives the order.
        devices: K >= 1.
        virtual_stages: v, the stages per device.
    """

    kind: ScheduleKind
    devices: int
    virtual_stages: int = 1

    @property
    def name(self) -> str:
        """The name of the kind."""
        return self.kind.name

    @property
    def stages(self) -> int:
        """vK, the number of stages."""
        return len(self.homes)

    @cached_property
    def homes(self) -> tuple[int, ...]:
        """For each stage the index of its device."""
        M = self.kind.example_chunks or 1
        order = self.kind.order(self.devices, M, self.virtual_stages)
        home = {stage: device for device, row in enumerate(order) for _, stage, _ in row}
        return tuple(home[stage] for stage in range(len(home)))

    def waiting(self, recomputes: Sequence[bool]) -> tuple[int, ...]:
        """The stages at which R should be an action of its own.

        There the device waits for a gradient from another one; R does not need it, so it can run
        meanwhile. The next stage is on another device.

        Args:
            recomputes: for each stage, whether its R computes anything.
        """
        neighbours = enumerate(pairwise(self.homes))
        return tuple(k for k, (own, after) in neighbours if recomputes[k] and own != after)

    def forwards_first(self) -> DeviceSchedule:
        """The same stages on the same devices, but all forwards before anything else."""
        first = replace(self.kind, order=_ForwardsFirst(self.kind.order), forwards_first=True)
        return replace(self, kind=first)

    def scheduled(
        self, chunks: int, *, backward: bool = True, early_recompute: Collection[int] = ()
    ) -> Scheduled:
        """List what each device runs in one training step.

        Args:
            chunks: M >= 1, the number of micro-batches.
            backward: False lists the forward actions only (inference).
            early_recompute: the stages at which R is an action of its own before each B, so that it
                runs while the device waits for the gradient. At others it is a part of B's action.
        """
        return _scheduled(self, chunks, backward, frozenset(early_recompute))


@dataclass(frozen=True)
class _ForwardsFirst:
    """An order in which each device runs its forwards first."""

    order: Callable[[int, int, int], Order]

    def __call__(self, K: int, M: int, v: int) -> Order:
        return [sorted(row, key=lambda action: action[0] != "F") for row in self.order(K, M, v)]


@lru_cache(maxsize=64)
def _scheduled(of: DeviceSchedule, chunks: int, backward: bool, early: frozenset[int]) -> Scheduled:
    order = of.kind.order(of.devices, chunks, of.virtual_stages)
    has_r = any("R" in letters for row in order for letters, _, _ in row)  # a user's own
    devices = []
    for row in order:
        actions = []
        for letters, stage, m in row:
            if letters == "F":
                actions.append(Action("F", stage, m))
            elif backward and "B" in letters and not has_r:
                parts = ("R", letters) if stage in early else ("R" + letters,)
                actions += [Action(part, stage, m) for part in parts]
            elif backward:
                actions.append(Action(letters, stage, m))
        devices.append(tuple(actions))
    for device, own in enumerate(devices):
        for action in own:
            if not (action.stage < of.stages and of.homes[action.stage] == device):
                raise OptionError(
                    f"schedule {of.name!r} for {chunks} micro-batches: stage {action.stage} is on"
                    f" device {device}",
                    expected="stages on the same devices for any number of micro-batches",
                )
    return Scheduled(of.name, of.stages, chunks, tuple(devices))
