"""What a cut is made for, and what it is estimated to take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autopipe.errors import OptionError
from autopipe.passes.devices import ADAM_BYTES, Device
from autopipe.passes.remat_policies import policy_of, repeats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.cost import CallSeconds
    from autopipe.passes.remat_policies import Policy


@dataclass(frozen=True)
class Objective:
    """What a cut is made for: K stages on K devices.

    Attributes:
        batch: samples in a micro-batch.
        devices: one per stage.
        remat: per stage a policy (see `policies`), or several: it takes the one that makes least
            work among those with which it keeps its limit.
        in_flight: per stage, micro-batches that are kept at once.
        limits: per stage, bytes that it may take; None: no limit.
        state_bytes: optimizer state per element of a parameter.
        times: of calls by name, where they were measured; None: the devices' own.
        scale: per stage, a factor >= 1 on the estimated bytes of activations, for a caller that
            found the estimate too low; empty: 1.
        missed: by stage and policy, bytes that the estimate is known to be too low by (negative:
            too high); where there is none, 0.

    Raises:
        OptionError: a value out of range, or not one for each stage.
    """

    batch: int
    devices: tuple[Device, ...]
    remat: tuple[Policy | tuple[Policy, ...], ...]
    in_flight: tuple[int, ...]
    limits: tuple[int | None, ...]
    state_bytes: int = ADAM_BYTES
    times: Mapping[str, CallSeconds] | None = None
    scale: tuple[float, ...] = ()
    missed: Mapping[tuple[int, Policy], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        K = len(self.devices)
        if K < 1 or self.batch < 1:
            found = f"{K} devices, {self.batch} samples"
            raise OptionError("there is no such pipeline", expected="at least one", found=found)
        for what in ("remat", "in_flight", "limits", "scale"):
            values = getattr(self, what)
            if len(values) != K and (what != "scale" or values):
                wanted, found = f"{K} values, one for each stage", f"{len(values)}"
                raise OptionError(f"`{what}` of a cut", expected=wanted, found=found)
        facts: list[tuple[str, bool, str]] = [
            (
                "remat",
                all(map(_are_policies, self.remat)),
                "full, none, min-cut or 0 to 1",
            ),
            ("in_flight", all(n >= 1 for n in self.in_flight), "micro-batches >= 1"),
            ("limits", all(n is None or n >= 0 for n in self.limits), "bytes >= 0 or None"),
            ("scale", all(1 <= f < math.inf for f in self.scale), "finite factors >= 1"),
            ("state_bytes", self.state_bytes >= 0, "bytes >= 0"),
        ]
        for what, right, wanted in facts:
            if not right:
                found = str(getattr(self, what))
                raise OptionError(f"`{what}` of a cut", expected=wanted, found=found)

    @property
    def stages(self) -> int:
        """K."""
        return len(self.devices)

    @property
    def is_one_memory(self) -> bool:
        """Whether nothing is ever copied between stages."""
        return not any(device.link.seconds(1) for device in self.devices)

    def policies(self, stage: int) -> tuple[Policy, ...]:
        """Those that a stage may have, from the one that makes least work on.

        (A stage without a limit has no use for others than that.)
        """
        several = self.remat[stage]
        several = several if isinstance(several, tuple) else (several,)
        ordered = sorted(dict.fromkeys(several), key=repeats)
        return tuple(ordered if self.limits[stage] is not None else ordered[:1])

    def factor(self, stage: int) -> float:
        """On the bytes of a stage's activations."""
        return self.scale[stage] if self.scale else 1.0


def objective_of(
    devices: Sequence[Device],
    batch: int,
    *,
    remat: Sequence[Policy | tuple[Policy, ...]] | Policy = "full",
    in_flight: Sequence[int] | None = None,
    times: Mapping[str, CallSeconds] | None = None,
) -> Objective:
    """The aim without limits.

    Args:
        devices: one per stage.
        batch: samples in a micro-batch.
        remat: of all stages, or of each.
        in_flight: per stage; None: 1.
        times: of calls by name; None: the devices' own.
    """
    K = len(devices)
    policies = (remat,) * K if isinstance(remat, (str, float)) else tuple(remat)
    flying = (1,) * K if in_flight is None else tuple(in_flight)
    return Objective(batch, tuple(devices), policies, flying, (None,) * K, times=times)


def _are_policies(value: object) -> bool:
    """Whether a stage may have this as its policy, or policies."""
    several = value if isinstance(value, tuple) else (value,)
    return bool(several) and all(policy_of(one) == one for one in several)
