"""The objective of a cut: devices, micro-batch size, rematerialization policies and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autopipe.errors import OptionError
from autopipe.passes.devices import ADAM_BYTES, Device
from autopipe.passes.remat_policies import DEFAULT, RematPolicy, policy_options

from .allowed_cuts import CutAt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.cost import CallSeconds


ANYWHERE = CutAt()
"""Cuts that the user does not restrict."""


@dataclass(frozen=True)
class Objective:
    """What a cut is optimized for: K stages on K devices.

    Attributes:
        batch: samples in a micro-batch.
        devices: one per stage.
        remat: per stage a policy, or several to choose from: the stage gets the one that recomputes
            least among those with which it stays within its limit.
        in_flight: per stage, the largest number of micro-batches whose saved values it stores at
            once.
        limits: per stage, bytes that it may use; None: no limit.
        state_bytes: optimizer state, bytes per element of a parameter.
        times: measured times of ops by name; None: those of the devices' models.
        corrections: by stage and policy, bytes to add to the estimate of a stage's memory, where a
            trace showed that it is too low (negative: too high).
        cut_at: where stages may start.
        exact: whether a shared parameter's gradient is sent back with every micro-batch; False:
            once a step.
        homes: per stage the index of the device that it shares with others; empty: none does.

    Raises:
        OptionError: a value out of range, or not one for each stage.
    """

    batch: int
    devices: tuple[Device, ...]
    remat: tuple[RematPolicy | tuple[RematPolicy, ...], ...]
    in_flight: tuple[int, ...]
    limits: tuple[int | None, ...]
    state_bytes: int = ADAM_BYTES
    times: Mapping[str, CallSeconds] | None = None
    corrections: Mapping[tuple[int, RematPolicy], int] = field(default_factory=dict)
    cut_at: CutAt = ANYWHERE
    exact: bool = True
    homes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        K = len(self.devices)
        if K < 1 or self.batch < 1:
            found = f"{K} devices, {self.batch} samples"
            raise OptionError("there is no such pipeline", expected="at least one", found=found)
        for what in ("remat", "in_flight", "limits", "homes"):
            values = getattr(self, what)
            if len(values) != K and (values or what != "homes"):
                wanted, found = f"{K} values, one for each stage", f"{len(values)}"
                raise OptionError(f"`{what}` of a cut", expected=wanted, found=found)
        checks: list[tuple[str, bool, str]] = [
            ("remat", all(map(_are_policies, self.remat)), ", ".join(policy_options())),
            ("in_flight", all(n >= 1 for n in self.in_flight), "micro-batches >= 1"),
            ("limits", all(n is None or n >= 0 for n in self.limits), "bytes >= 0 or None"),
            ("state_bytes", self.state_bytes >= 0, "bytes >= 0"),
            ("homes", all(home >= 0 for home in self.homes), "indices >= 0"),
        ]
        for what, right, wanted in checks:
            if not right:
                found = str(getattr(self, what))
                raise OptionError(f"`{what}` of a cut", expected=wanted, found=found)

    @property
    def stages(self) -> int:
        """K."""
        return len(self.devices)

    @property
    def transfers_are_free(self) -> bool:
        """Whether transfers between devices cost no time, as between CPU workers."""
        return not any(device.link.seconds(1) for device in self.devices)

    def policies(self, stage: int) -> tuple[RematPolicy, ...]:
        """The policies that a stage may get, the one that recomputes least first.

        Args:
            stage: its number.

        Returns:
            The policies; for a stage without a limit only the first, since it need not recompute
            more.
        """
        several = self.remat[stage]
        several = several if isinstance(several, tuple) else (several,)
        ordered = sorted(dict.fromkeys(several), key=lambda policy: policy.rank)
        return tuple(ordered if self.limits[stage] is not None else ordered[:1])


def objective_of(
    devices: Sequence[Device],
    batch: int,
    *,
    remat: Sequence[RematPolicy | tuple[RematPolicy, ...]] | RematPolicy = DEFAULT,
    in_flight: Sequence[int] | None = None,
    times: Mapping[str, CallSeconds] | None = None,
    cut_at: CutAt = ANYWHERE,
    exact: bool = True,
    homes: Sequence[int] = (),
) -> Objective:
    """The objective without limits.

    Args:
        devices: one per stage.
        batch: samples in a micro-batch.
        remat: the policy of all stages, or of each.
        in_flight: micro-batches per stage; None: 1.
        times: measured times of ops by name; None: those of the devices' models.
        cut_at: where stages may start.
        exact, homes: see `Objective`.

    Raises:
        OptionError: a value out of range, or not one for each stage.
    """
    K = len(devices)
    policies = (remat,) * K if isinstance(remat, RematPolicy) else tuple(remat)
    counts = (1,) * K if in_flight is None else tuple(in_flight)
    limits = (None,) * K
    devices = tuple(devices)
    more: dict[str, Any] = {"times": times, "cut_at": cut_at, "exact": exact}
    more["homes"] = tuple(homes)
    return Objective(batch, devices, policies, counts, limits, **more)


def _are_policies(value: object) -> bool:
    """Whether a value is a policy, or several."""
    several = value if isinstance(value, tuple) else (value,)
    return bool(several) and all(isinstance(one, RematPolicy) for one in several)
