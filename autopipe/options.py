"""What a user can ask for, checked once, before anything is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from autopipe import option_parsing
from autopipe.errors import OptionError, UnsupportedError
from autopipe.passes.capture import CaptureRequest
from autopipe.passes.ir import REDUCTIONS
from autopipe.passes.schedule import DEFAULT_KIND, EXECUTED, KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.utils._pytree import TreeSpec

    from autopipe.passes.devices import Device
    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.planning.plans import Plan

BATCH_NORM = ("deferred", "micro")


class Given(NamedTuple):
    """Micro-batches, and one policy for each stage."""

    chunks: int
    remat: tuple[RematPolicy, ...]


@dataclass(frozen=True)
class Options:
    """Checked options of `autopipe.compile` and `autopipe.plan`; see there.

    What the planner is to choose is None: `chunks`, `remat` (one policy for each stage),
    `schedule`; `limits` and `models` are None where no limit and no speeds were given.
    """

    devices: tuple[torch.device, ...]
    chunks: int | None
    schedule: str | None
    remat: tuple[RematPolicy, ...] | None
    in_dims: Any
    out_reduce: str | None
    batch_norm: str
    loss_fn: Callable[..., Tensor] | None = None
    limits: tuple[int, ...] | None = None
    models: tuple[Device, ...] | None = None
    profile: bool = False
    plan: Plan | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is anything to choose, or to keep to, that needs a plan first."""
        chosen = (self.chunks, self.schedule, self.remat)
        return self.plan is None and (None in chosen or self.limits is not None or self.profile)

    @property
    def kind(self) -> str:
        """The schedule; of those that the runtime runs there is one to choose."""
        return self.schedule or DEFAULT_KIND

    @property
    def whole(self) -> bool:
        """Whether samples may depend on one another: one micro-batch was asked for, not chosen."""
        return self.chunks == 1 if self.plan is None else self.plan.whole

    @property
    def given(self) -> Given:
        """Chunks and policies where nothing is left to choose."""
        assert self.chunks is not None
        assert self.remat is not None
        return Given(self.chunks, self.remat)

    def capture_request(
        self,
        model: nn.Module,
        leaves: Sequence[Any],
        spec: TreeSpec,
        batch_dims: Sequence[int | None],
        *,
        single: bool = False,
    ) -> CaptureRequest:
        """What to capture of a model under these options.

        Args:
            model, leaves, spec, batch_dims, single: see `CaptureRequest`.
        """
        return CaptureRequest(
            model,
            leaves,
            spec,
            batch_dims,
            whole=self.whole,
            single=single,
            batch_norm=self.batch_norm,
            out_reduce=self.out_reduce,
        )

    def planned(self, plan: Plan) -> Options:
        """The same with what a plan says."""
        remat = tuple(option_parsing.policy(s.remat) for s in plan.stages)
        return replace(self, chunks=plan.chunks, schedule=plan.schedule, remat=remat, plan=plan)


def check(
    *,
    devices: int | Sequence[str | torch.device] | None,
    chunks: int | None,
    schedule: str | None,
    remat: str | float | Sequence[str | float] | None,
    memory: int | str | Sequence[int | str] | None,
    in_dims: Any,
    out_reduce: str | None,
    batch_norm: str,
    backend: str = "eager",
    loss_fn: Callable[..., Tensor] | None = None,
    device: str | Device | Sequence[str | Device] | None = None,
    profile: bool = False,
    plan: Plan | None = None,
    elsewhere: bool = False,
) -> Options:
    """Turn what the user wrote into `Options`; what is None is the plan's, or has a default.

    Args:
        elsewhere: the pipeline will run on another machine: `devices` may be more than are here.

    Raises:
        OptionError, DeviceError, UnsupportedError: with what would be right.
    """
    if plan is not None:
        devices = _agree(plan, devices, chunks, schedule, remat, memory)
        schedule = plan.schedule
    if devices is None:
        raise OptionError(
            "a pipeline needs devices",
            expected="devices=8, or a plan that says how many",
            found=f"devices={devices!r}",
        )
    if chunks is not None and (
        not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1
    ):
        raise OptionError(
            "chunks is the number of micro-batches that a batch is cut into",
            expected="an integer of at least 1, or None: the planner chooses",
            found=repr(chunks),
        )
    if schedule not in (None, *KINDS, "auto"):
        known = ", ".join((*EXECUTED, "auto"))
        raise OptionError("unknown schedule", expected=f"one of {known}", found=repr(schedule))
    if schedule not in (None, *EXECUTED, "auto"):
        raise UnsupportedError(
            f"the runtime does not execute schedule={schedule!r} yet",
            expected=f"one of {', '.join(EXECUTED)}",
            remedy=f'use schedule="{DEFAULT_KIND}"',
        )
    if backend == "inductor":
        raise UnsupportedError(
            'backend="inductor" is not implemented yet', remedy='use backend="eager"'
        )
    if backend != "eager":
        raise OptionError("unknown backend", expected="eager", found=repr(backend))
    if out_reduce not in (None, *REDUCTIONS):
        names = " or ".join(f'"{name}"' for name in REDUCTIONS)
        raise OptionError("unknown out_reduce", expected=f"None, {names}", found=repr(out_reduce))
    if batch_norm not in BATCH_NORM:
        raise OptionError(
            "unknown batch_norm", expected=f"one of {', '.join(BATCH_NORM)}", found=repr(batch_norm)
        )
    parsed = option_parsing.parse_devices(devices, elsewhere=elsewhere)
    K = len(parsed)
    options = Options(
        devices=parsed,
        chunks=chunks,
        schedule=None if schedule == "auto" else schedule or DEFAULT_KIND,
        remat=option_parsing.policies(remat, K),
        in_dims=in_dims,
        out_reduce=out_reduce,
        batch_norm=batch_norm,
        loss_fn=loss_fn,
        limits=None
        if memory is None
        else option_parsing.each("memory", memory, K, option_parsing.size),
        models=None
        if device is None
        else option_parsing.each("device", device, K, option_parsing.speeds),
        profile=profile,
    )
    return options if plan is None else options.planned(plan)


def _agree(
    plan: Plan,
    devices: int | Sequence[str | torch.device] | None,
    chunks: int | None,
    schedule: str | None,
    remat: Any,
    memory: Any,
) -> Any:
    """What is given beside a plan must be the plan's (devices: as many). Returns the devices."""
    K = len(plan.stages)
    asked = devices if isinstance(devices, int) or devices is None else len(devices)
    policies = tuple(option_parsing.policy(s.remat) for s in plan.stages)
    pairs: dict[str, tuple[Any, Any]] = {
        "devices": (asked, K),
        "chunks": (chunks, plan.chunks),
        "schedule": (schedule, plan.schedule),
    }
    if remat is not None and option_parsing.policies(remat, K) != policies:
        pairs["remat"] = (remat, plan.remat)
    for name, (given, planned) in pairs.items():
        if given is not None and given != planned:
            raise OptionError(
                f"{name} is not the plan's",
                expected=f"{name}={planned!r}",
                found=f"{name}={given!r}",
                remedy=f"leave {name} to the plan, or make another plan",
            )
    if memory is not None:
        raise OptionError(
            "a memory limit beside a plan",
            found=f"memory={memory!r}",
            remedy="give the limit to autopipe.plan, or leave the plan out",
        )
    return K if devices is None else devices
