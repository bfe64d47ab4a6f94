"""Options of `compile` and `plan`, checked once, before anything is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from autopipe import option_parsing
from autopipe.errors import OptionError, UnsupportedError, shown
from autopipe.passes.capture import CaptureRequest
from autopipe.passes.devices import CPU_CORE, device_named_in_torch
from autopipe.passes.ir import REDUCTIONS
from autopipe.passes.schedule import DEFAULT_KIND, EXECUTED, KINDS
from autopipe.runtime.backends import backend_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor, nn
    from torch.utils._pytree import TreeSpec

    from autopipe.passes.devices import Device
    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.planning.plans import Plan

BATCH_NORM = ("deferred", "micro")


class ResolvedOptions(NamedTuple):
    """The options that the planner may choose, with the values chosen.

    Attributes:
        chunks: number of micro-batches.
        remat: one policy per stage.
    """

    chunks: int
    remat: tuple[RematPolicy, ...]


@dataclass(frozen=True)
class Options:
    """Checked options of `autopipe.compile` and `autopipe.plan`, which describe them.

    Attributes:
        devices: one per stage.
        chunks, schedule, remat: None if the planner chooses; `remat` has a policy per stage.
        in_dims, out_reduce, batch_norm, loss_fn, profile, plan: as the user wrote them.
        limits: bytes of memory per device; None: no limit.
        dynamic: argument → dimension whose size may change → its name, or None.
        cache_size: number of generated programs that are kept.
        models: device models for the times of each stage; None: those of `devices`.
        cut_at: as the user wrote it; see `cut_positions`.
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
    dynamic: Mapping[str, Mapping[int, str | None]] | None = None
    cache_size: int = 32
    cut_at: Any = None

    @property
    def needs_planning(self) -> bool:
        """Whether a search must choose something or satisfy a memory limit."""
        choices = (self.chunks, self.schedule, self.remat)
        return self.plan is None and (None in choices or self.limits is not None or self.profile)

    @property
    def schedule_kind(self) -> str:
        """The schedule to run; "auto" is the default kind: kinds are not compared."""
        return self.schedule or DEFAULT_KIND

    @property
    def starts_early(self) -> bool:
        """Whether training starts a backward before the last forward has ended."""
        return not KINDS[self.schedule_kind].forwards_first

    @property
    def whole_batch(self) -> bool:
        """Whether the user asked for one micro-batch: then samples may depend on one another."""
        return self.chunks == 1 if self.plan is None else self.plan.whole

    @property
    def device_models(self) -> tuple[Device, ...]:
        """The device model of each stage."""
        return self.models or models_of(self.devices)

    @property
    def resolved(self) -> ResolvedOptions:
        """Chunks and policies, when nothing is left to choose."""
        assert self.chunks is not None
        assert self.remat is not None
        return ResolvedOptions(self.chunks, self.remat)

    def capture_request(
        self,
        model: nn.Module,
        leaves: Sequence[Any],
        spec: TreeSpec,
        batch_dims: Sequence[int | None],
        lengths: Sequence[Mapping[int, str | None]] = (),
        *,
        numbers: Collection[int] = (),
        single: bool = False,
    ) -> CaptureRequest:
        """Build the request to capture a model under these options.

        Args:
            model, leaves, spec, batch_dims, lengths, numbers, single: see `CaptureRequest`.
        """
        return CaptureRequest(
            model,
            leaves,
            spec,
            batch_dims,
            lengths,
            numbers,
            whole=self.whole_batch,
            single=single,
            batch_norm=self.batch_norm,
            out_reduce=self.out_reduce,
            loss_fn=self.loss_fn,
        )

    def planned(self, plan: Plan) -> Options:
        """Return these options with the choices of a plan."""
        remat = tuple(option_parsing.policy(s.remat) for s in plan.stages)
        return replace(self, chunks=plan.chunks, schedule=plan.schedule, remat=remat, plan=plan)


def models_of(devices: Sequence[torch.device]) -> tuple[Device, ...]:
    """Return the device model of each torch device: GPUs are recognized by their names."""
    return tuple(
        CPU_CORE if d.type == "cpu" else device_named_in_torch(backend_of(d).name(d))
        for d in devices
    )


def parse_options(
    *,
    devices: int | Sequence[int | str | torch.device] | None,
    chunks: int | None,
    schedule: str | None,
    remat: str | float | Sequence[str | float] | None,
    memory: float | str | Sequence[float | str] | None,
    in_dims: Any,
    out_reduce: str | None,
    batch_norm: str,
    backend: str = "eager",
    loss_fn: Callable[..., Tensor] | None = None,
    device: str | Device | Sequence[str | Device] | None = None,
    profile: bool = False,
    plan: Plan | None = None,
    dynamic: Mapping[str, Mapping[int, str | None]] | None = None,
    cache_size: int = 32,
    cut_at: Any = None,
    elsewhere: bool = False,
) -> Options:
    """Check what the user wrote; None means the plan's value or the default.

    Args:
        devices, chunks, schedule, remat, memory, in_dims, out_reduce, batch_norm: as for `compile`.
        backend, loss_fn, profile, plan, dynamic, cache_size, cut_at: as for `compile`.
        device: as for `autopipe.plan`.
        elsewhere: the pipeline will run on another machine, so more `devices` than are here are
            allowed.

    Raises:
        OptionError, DeviceError, UnsupportedError: an option is wrong; the error says what is
            valid.
    """
    if plan is not None:
        devices = _devices_beside_plan(plan, devices, chunks, schedule, remat, memory, cut_at)
        schedule = plan.schedule
    if devices is None:
        raise OptionError(
            "a pipeline needs devices",
            expected="devices=8, or a plan that says how many",
            found=f"devices={shown(devices)}",
        )
    if chunks is not None:
        option_parsing.check_count("chunks", chunks, "micro-batches that a batch is cut into")
    option_parsing.check_count("cache_size", cache_size, "generated programs that are kept")
    _check_schedule(schedule)
    _check_backend(backend)
    _check_reductions(out_reduce, batch_norm)
    option_parsing.check_dynamic(dynamic)
    if loss_fn is not None and not callable(loss_fn):
        expected = "a function: loss_fn(output, target)"
        raise OptionError("loss_fn is no function", expected=expected, found=shown(loss_fn))
    parsed = option_parsing.parse_devices(devices, elsewhere=elsewhere)
    each, count = option_parsing.each, len(parsed)
    options = Options(
        devices=parsed,
        chunks=chunks,
        schedule=None if schedule == "auto" else schedule or DEFAULT_KIND,
        remat=option_parsing.policies(remat, count),
        in_dims=in_dims,
        out_reduce=out_reduce,
        batch_norm=batch_norm,
        loss_fn=loss_fn,
        limits=None if memory is None else each("memory", memory, count, option_parsing.size),
        models=None if device is None else each("device", device, count, option_parsing.speeds),
        profile=profile,
        dynamic=dynamic,
        cache_size=cache_size,
        cut_at=cut_at,
    )
    return options if plan is None else options.planned(plan)


def _check_schedule(schedule: str | None) -> None:
    known = ", ".join((*EXECUTED, "auto"))
    if schedule not in (None, *KINDS, "auto"):
        raise OptionError("unknown schedule", expected=f"one of {known}", found=shown(schedule))
    if schedule not in (None, *EXECUTED, "auto"):
        raise UnsupportedError(
            f"the runtime does not execute schedule={shown(schedule)} yet",
            expected=f"one of {known}",
            remedy=f'use schedule="{DEFAULT_KIND}"',
        )


def _check_backend(backend: str) -> None:
    if backend == "inductor":
        raise UnsupportedError(
            'backend="inductor" is not implemented yet', remedy='use backend="eager"'
        )
    if backend != "eager":
        raise OptionError("unknown backend", expected="eager", found=shown(backend))


def _check_reductions(out_reduce: str | None, batch_norm: str) -> None:
    if out_reduce not in (None, *REDUCTIONS):
        names = " or ".join(f'"{name}"' for name in REDUCTIONS)
        raise OptionError("unknown out_reduce", expected=f"None, {names}", found=shown(out_reduce))
    if batch_norm not in BATCH_NORM:
        raise OptionError(
            "unknown batch_norm",
            expected=f"one of {', '.join(BATCH_NORM)}",
            found=shown(batch_norm),
        )


def _devices_beside_plan(
    plan: Plan,
    devices: int | Sequence[int | str | torch.device] | None,
    chunks: int | None,
    schedule: str | None,
    remat: Any,
    memory: Any,
    cut_at: Any,
) -> Any:
    """Check that the other options agree with a plan (devices: in number); return the devices."""
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
                expected=f"{name}={shown(planned)}",
                found=f"{name}={shown(given)}",
                remedy=f"leave {name} to the plan, or make another plan",
            )
    for what, name, value in (
        ("a memory limit", "memory", memory),
        ("positions to cut at", "cut_at", cut_at),
    ):
        if value is not None:
            raise OptionError(
                f"{what} beside a plan",
                found=f"{name}={shown(value)}",
                remedy=f"give {name} to autopipe.plan, or leave the plan out",
            )
    return K if devices is None else devices
