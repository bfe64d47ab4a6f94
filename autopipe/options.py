"""Options of `compile` and `plan`, checked once, before anything is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from autopipe import option_parsing
from autopipe.beside_plan import devices_beside_plan, known_devices
from autopipe.errors import OptionError, shown
from autopipe.passes.capture import CaptureRequest
from autopipe.passes.devices import CPU_CORE, device_named_in_torch
from autopipe.passes.ir import REDUCTIONS
from autopipe.passes.schedule import DEFAULT_KIND, schedule_for
from autopipe.planning.measured import Measured, check_profile
from autopipe.runtime.backends import backend_of
from autopipe.schedule_option import parse_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor, nn
    from torch.utils._pytree import TreeSpec

    from autopipe.passes.devices import Device
    from autopipe.passes.kernels import Capability
    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.passes.schedule import DeviceSchedule
    from autopipe.planning.plans import Plan

T = TypeVar("T")

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
        devices: K devices; a schedule may put several stages on each.
        chunks, schedule, remat: None if the planner chooses; `remat` has a policy per device, or
            per stage.
        in_dims, out_reduce, batch_norm, loss_fn, profile, plan: as the user wrote them.
        limits: bytes of memory per device; None: no limit.
        dynamic: argument → dimension whose size may change → its name, or None.
        cache_size: number of generated programs that are kept.
        models: a device model for each device; None: those of `devices`.
        cut_at: as the user wrote it; see `cut_positions`.
        mode: how inductor compiles the phases; None: they run eagerly.
        backend: what runs the phases.
        exact: whether sums of shared parameters' gradients have eager PyTorch's bits.
    """

    devices: tuple[torch.device, ...]
    chunks: int | None
    schedule: DeviceSchedule | None
    remat: tuple[RematPolicy, ...] | None
    in_dims: Any
    out_reduce: str | None
    batch_norm: str
    loss_fn: Callable[..., Tensor] | None = None
    limits: tuple[int, ...] | None = None
    models: tuple[Device, ...] | None = None
    profile: bool | Measured = False
    plan: Plan | None = None
    dynamic: Mapping[str, Mapping[int, str | None]] | None = None
    cache_size: int = 32
    cut_at: Any = None
    mode: str | None = None
    backend: str = "eager"
    exact: bool = True

    @property
    def needs_planning(self) -> bool:
        """Whether a search must choose something or satisfy a memory limit."""
        choices = (self.chunks, self.schedule, self.remat)
        asked = self.limits is not None or self.profile is not False
        return self.plan is None and (None in choices or asked)

    @property
    def order(self) -> DeviceSchedule:
        """The schedule to run; the default kind as long as none is chosen."""
        return self.schedule or schedule_for(DEFAULT_KIND, len(self.devices))

    @property
    def starts_early(self) -> bool:
        """Whether training starts a backward before the last forward has ended."""
        return not self.order.kind.forwards_first

    def by_stage(self, values: Sequence[T]) -> tuple[T, ...]:
        """For each stage the value of its device.

        Args:
            values: one per device; or one per stage, which are returned as they are.
        """
        homes = self.order.homes
        return tuple(values if len(values) == len(homes) else (values[home] for home in homes))

    @property
    def stage_devices(self) -> tuple[torch.device, ...]:
        """The device of each stage."""
        return self.by_stage(self.devices)

    @property
    def whole_batch(self) -> bool:
        """Whether the user asked for one micro-batch: then samples may depend on one another."""
        return self.chunks == 1 if self.plan is None else self.plan.whole

    @property
    def stage_models(self) -> tuple[Device, ...]:
        """The device model of each stage."""
        return self.by_stage(self.models or models_of(self.devices))

    @property
    def stage_kernels(self) -> tuple[Capability | None, ...]:
        """For each stage the compute capability of the GPU whose kernels a plan goes by; None: by
        those of its torch device."""
        own = self.models is None or self.profile is not False
        pairs = zip(self.stage_devices, self.stage_models, strict=True)
        return tuple(None if own or d.type == "cuda" else m.compute_capability for d, m in pairs)

    @property
    def resolved(self) -> ResolvedOptions:
        """Chunks and policies, when nothing is left to choose."""
        assert self.chunks is not None
        assert self.remat is not None
        return ResolvedOptions(self.chunks, self.by_stage(self.remat))

    @property
    def stage_remat(self) -> tuple[RematPolicy, ...] | None:
        """The policy of each stage; None if the planner chooses them."""
        return None if self.remat is None else self.by_stage(self.remat)

    @property
    def stage_limits(self) -> tuple[int, ...] | None:
        """For each stage an equal share of its device's limit; None: no limit."""
        if self.limits is None:
            return None
        homes = self.order.homes
        return tuple(self.limits[home] // homes.count(home) for home in homes)

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
        return replace(self, chunks=plan.chunks, schedule=plan.order, remat=remat, plan=plan)


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
    schedule: Any,
    virtual_stages: int | None = None,
    remat: str | float | Sequence[str | float] | None,
    memory: float | str | Sequence[float | str] | None,
    in_dims: Any,
    out_reduce: str | None,
    batch_norm: str,
    backend: str = "eager",
    loss_fn: Callable[..., Tensor] | None = None,
    device: str | Device | Sequence[str | Device] | None = None,
    profile: bool | Measured = False,
    plan: Plan | None = None,
    dynamic: Mapping[str, Mapping[int, str | None]] | None = None,
    cache_size: int = 32,
    cut_at: Any = None,
    mode: str | None = None,
    exact: bool = True,
    elsewhere: bool = False,
) -> Options:
    """Check what the user wrote; None means the plan's value or the default.

    Args:
        devices, chunks, schedule, virtual_stages, remat, memory, in_dims, out_reduce, batch_norm:
            as for `compile`.
        backend, loss_fn, profile, plan, dynamic, cache_size, cut_at, mode, exact: as for `compile`.
        device: as for `autopipe.plan`.
        elsewhere: the pipeline will run on another machine, so more `devices` than are here are
            allowed.

    Raises:
        OptionError, DeviceError, UnsupportedError: an option is wrong; the error says what is
            valid.
    """
    if plan is not None:
        devices = devices_beside_plan(
            plan, devices, chunks, schedule, virtual_stages, remat, memory, cut_at
        )
        schedule = virtual_stages = None
    devices = known_devices(devices)
    _check_counts(chunks, cache_size)
    option_parsing.check_backend(backend, mode)
    _check_reductions(out_reduce, batch_norm)
    option_parsing.check_dynamic(dynamic)
    option_parsing.check_exact(exact)
    _check_loss(loss_fn, profile)
    parsed = option_parsing.parse_devices(devices, elsewhere=elsewhere)
    each, count = option_parsing.each, len(parsed)
    order = parse_schedule(schedule, virtual_stages, count, chunks)
    options = Options(
        devices=parsed,
        chunks=order.kind.most_chunks if order and chunks is None else chunks,
        schedule=order,
        remat=option_parsing.policies(remat, count, 0 if order is None else order.stages),
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
        mode=mode or "default" if backend == "inductor" else None,
        backend=backend,
        exact=exact,
    )
    return options if plan is None else options.planned(plan)


def _check_counts(chunks: int | None, cache_size: int) -> None:
    if chunks is not None:
        option_parsing.check_count("chunks", chunks, "micro-batches that a batch is cut into")
    option_parsing.check_count("cache_size", cache_size, "generated programs that are kept")


def _check_loss(loss_fn: object, profile: object) -> None:
    check_profile(profile)
    if loss_fn is not None and not callable(loss_fn):
        expected = "a function: loss_fn(output, target)"
        raise OptionError("loss_fn is no function", expected=expected, found=shown(loss_fn))


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
