"""What a user writes for devices, limits and policies → values; each message says what is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from autopipe.errors import DeviceError, OptionError
from autopipe.passes.devices import Device, device_of
from autopipe.passes.remat_policies import DEFAULT, RematPolicy, parse_policy, policy_options

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def policies(
    remat: str | float | Sequence[str | float] | None, count: int
) -> tuple[RematPolicy, ...] | None:
    """A policy for each stage; None: the planner chooses."""
    if remat == "auto":
        return None
    return each("remat", DEFAULT.option if remat is None else remat, count, policy)


def policy(value: Any) -> RematPolicy:
    """What a stage keeps: a name, or a fraction."""
    found = parse_policy(value)
    if found is None:
        expected = f"one of {', '.join(policy_options())}; or auto"
        raise OptionError("unknown remat", expected=expected, found=repr(value))
    return found


def speeds(value: Any) -> Device:
    """A device model, or that of a name in the table."""
    return value if isinstance(value, Device) else device_of(value)


def each(what: str, value: Any, count: int, read: Callable[[Any], T]) -> tuple[T, ...]:
    """One value for all stages, or a list of one for each."""
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise OptionError(
                f"`{what}` is one value, or one for each device",
                expected=f"{count} values",
                found=f"{len(value)}",
            )
        return tuple(map(read, value))
    return (read(value),) * count


def size(value: Any) -> int:
    """Bytes, from a number or from a text such as 16GiB or 80 GB."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTkmgt]?)(i?)B\s*", str(value))
    if match is None or (match[3] and not match[2]) or isinstance(value, int):
        raise OptionError(
            "`memory` is what a device has for the pipeline",
            expected='bytes above 0, as a number or as "16GiB" (2^30) or "80GB" (10^9)',
            found=repr(value),
        )
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def places(
    devices: int | Sequence[str | torch.device], *, elsewhere: bool
) -> tuple[torch.device, ...]:
    """The device of each stage; a count is of GPUs, of CPU workers where there is none.

    `elsewhere`: the pipeline will run on another machine; a count may be above what is here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if isinstance(devices, int) and not isinstance(devices, bool):
        if devices < 1:
            raise OptionError(
                "a pipeline needs a device", expected="at least 1", found=str(devices)
            )
        if gpus == 0 or (elsewhere and devices > gpus):
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
    listed = tuple(_place(d, gpus) for d in devices)
    if not listed:
        raise OptionError("a pipeline needs a device", expected="at least 1", found="an empty list")
    return listed


def _place(value: str | torch.device, gpus: int) -> torch.device:
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
