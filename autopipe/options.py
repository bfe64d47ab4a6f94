"""What a user can ask for, checked once, before anything is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from autopipe.errors import DeviceError, OptionError, UnsupportedError
from autopipe.passes.phases import POLICIES
from autopipe.passes.schedule import KNOWN

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from autopipe.plans import Plan

EXECUTED = ("gpipe",)
"""The schedules that the runtime runs (the simulator knows more)."""


OUT_REDUCE = (None, "mean", "sum")
BATCH_NORM = ("deferred", "micro")


@dataclass(frozen=True)
class Options:
    """Checked options of `autopipe.compile`; see there."""

    devices: tuple[torch.device, ...]
    chunks: int
    schedule: str
    remat: str
    in_dims: Any
    out_reduce: str | None
    batch_norm: str
    loss_fn: Callable[..., Tensor] | None
    plan: Plan | None = None


def check(
    *,
    devices: int | Sequence[str | torch.device] | None,
    chunks: int | None,
    schedule: str | None,
    remat: str | float | None,
    memory: int | str | None,
    in_dims: Any,
    out_reduce: str | None,
    batch_norm: str,
    loss_fn: Callable[..., Tensor] | None,
    backend: str,
    plan: Plan | None = None,
) -> Options:
    """Turn what the user wrote into `Options`; what is None is the plan's, or has a default.

    Raises:
        OptionError, DeviceError, UnsupportedError: with what would be right.
    """
    if plan is not None:
        devices, chunks, schedule, remat = _planned(plan, devices, chunks, schedule, remat)
    if devices is None or chunks is None:
        raise OptionError(
            "a pipeline needs devices and chunks",
            expected="devices=8, chunks=16, or a plan that says them",
            found=f"devices={devices!r}, chunks={chunks!r}",
        )
    schedule, remat = schedule or "gpipe", "full" if remat is None else remat
    if not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1:
        raise OptionError(
            "chunks is the number of micro-batches that a batch is cut into",
            expected="an integer of at least 1",
            found=repr(chunks),
        )
    if schedule not in (*KNOWN, "auto"):
        raise OptionError(
            "unknown schedule", expected=f"one of {', '.join(EXECUTED)}", found=repr(schedule)
        )
    if schedule not in EXECUTED:
        raise UnsupportedError(
            f"the runtime does not execute schedule={schedule!r} yet",
            expected=f"one of {', '.join(EXECUTED)}",
            remedy='use schedule="gpipe"',
        )
    if remat == "auto" or (isinstance(remat, float) and 0 <= remat <= 1):
        raise UnsupportedError(
            f"remat={remat!r} is not implemented yet", remedy=f"use one of {', '.join(POLICIES)}"
        )
    if not isinstance(remat, str) or remat not in POLICIES:
        raise OptionError(
            "unknown remat", expected=f"one of {', '.join(POLICIES)}", found=repr(remat)
        )
    if memory is not None:
        raise UnsupportedError(
            "a memory limit is not implemented yet",
            remedy="leave memory=None; pipe.memory shows what stages save",
        )
    if backend == "inductor":
        raise UnsupportedError(
            'backend="inductor" is not implemented yet', remedy='use backend="eager"'
        )
    if backend != "eager":
        raise OptionError("unknown backend", expected="eager", found=repr(backend))
    if out_reduce not in OUT_REDUCE:
        raise OptionError(
            "unknown out_reduce", expected='None, "mean" or "sum"', found=repr(out_reduce)
        )
    if batch_norm not in BATCH_NORM:
        raise OptionError(
            "unknown batch_norm", expected=f"one of {', '.join(BATCH_NORM)}", found=repr(batch_norm)
        )
    return Options(
        _devices(devices), chunks, schedule, remat, in_dims, out_reduce, batch_norm, loss_fn, plan
    )


def _planned(
    plan: Plan,
    devices: int | Sequence[str | torch.device] | None,
    chunks: int | None,
    schedule: str | None,
    remat: str | float | None,
) -> tuple[Any, int, str, str]:
    """A plan's own options; those given beside it must be the same (devices: as many)."""
    K = len(plan.stages)
    asked = devices if isinstance(devices, int) or devices is None else len(devices)
    pairs = {
        "devices": (asked, K),
        "chunks": (chunks, plan.chunks),
        "schedule": (schedule, plan.schedule),
        "remat": (remat, plan.remat),
    }
    for name, (given, planned) in pairs.items():
        if given is not None and given != planned:
            raise OptionError(
                f"{name} is not the plan's",
                expected=f"{name}={planned!r}",
                found=f"{name}={given!r}",
                remedy=f"leave {name} to the plan, or make another plan",
            )
    return K if devices is None else devices, plan.chunks, plan.schedule, plan.remat


def _devices(devices: int | Sequence[str | torch.device]) -> tuple[torch.device, ...]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if isinstance(devices, int) and not isinstance(devices, bool):
        if devices < 1:
            raise OptionError(
                "a pipeline needs a device", expected="at least 1", found=str(devices)
            )
        if gpus == 0:
            return (torch.device("cpu"),) * devices
        if devices > gpus:
            raise DeviceError(
                f"{devices} devices were asked for",
                found=f"{gpus} GPU{'s' if gpus > 1 else ''}",
                remedy='a list may name a GPU several times (devices=["cuda:0", "cuda:0"] puts two'
                ' stages on one), or name CPU workers (["cpu", "cpu"])',
            )
        return tuple(torch.device("cuda", i) for i in range(devices))
    if isinstance(devices, (str, int)) or not isinstance(devices, Sequence):
        raise OptionError(
            "devices is a count or a list",
            expected='2 or ["cuda:0", "cuda:1"]',
            found=repr(devices),
        )
    listed = tuple(_device(d, gpus) for d in devices)
    if not listed:
        raise OptionError("a pipeline needs a device", expected="at least 1", found="an empty list")
    return listed


def _device(value: str | torch.device, gpus: int) -> torch.device:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            "no such device", expected='"cpu" or "cuda:0"', found=repr(value)
        ) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) < gpus:
        return torch.device("cuda", device.index or 0)
    raise DeviceError(
        "no such device here",
        expected='"cpu"' + (f' or "cuda:0" … "cuda:{gpus - 1}"' if gpus else " (there is no GPU)"),
        found=repr(str(value)),
    )
