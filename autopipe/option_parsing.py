"""Parse what a user writes for devices, limits and policies; each error says what is valid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from autopipe.errors import DeviceError, OptionError, shown
from autopipe.passes.capture import RESERVED
from autopipe.passes.devices import Device, device_of
from autopipe.passes.graph import is_identifier
from autopipe.passes.inductor import MODES
from autopipe.passes.remat_policies import DEFAULT, RematPolicy, parse_policy, policy_options
from autopipe.runtime.backends import accelerators, backend_of

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MOST_DEVICES = 1024
"""As in a plan's file."""

LONGEST_NUMBER = 30
"""Characters of the number in a size."""


def policies(
    remat: str | float | Sequence[str | float] | None, count: int, stages: int = 0
) -> tuple[RematPolicy, ...] | None:
    """Parse `remat`.

    Args:
        remat: a policy for all stages, a list of one for each, "auto", or None for the default.
        count: number of devices.
        stages: number of stages, if it is known.

    Returns:
        A policy for each device, or for each stage; None if the planner chooses them.

    Raises:
        OptionError: an unknown policy, or a list of another length.
    """
    if remat == "auto":
        return None
    if isinstance(remat, (list, tuple)) and stages > count:
        if len(remat) not in (count, stages):
            raise OptionError(
                "`remat` is one value, or one for each device, or one for each stage",
                expected=f"{count} values, or {stages}",
                found=f"{len(remat)}",
            )
        count = len(remat)
    return each("remat", DEFAULT.option if remat is None else remat, count, policy)


def policy(value: Any) -> RematPolicy:
    """Parse one policy: a name, or a fraction of activations to save.

    Raises:
        OptionError: it is neither.
    """
    found = parse_policy(value)
    if found is None:
        expected = f"one of {', '.join(policy_options())}; or auto"
        raise OptionError("unknown remat", expected=expected, found=shown(value))
    return found


def speeds(value: Any) -> Device:
    """Parse a device model: a `Device`, or its name in the table."""
    return value if isinstance(value, Device) else device_of(value)


def each(what: str, value: Any, count: int, read: Callable[[Any], T]) -> tuple[T, ...]:
    """Parse one value for all stages, or a list of one for each.

    Args:
        what: name of the option, for the error.
        value: what the user wrote.
        count: number of stages.
        read: parses one value.

    Raises:
        OptionError: a list of another length.
    """
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
    """Parse a number of bytes: a whole number (16e9 too), or a text such as 16GiB or 80 GB.

    Raises:
        OptionError: it is neither, or not above 0.
    """
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if whole and not isinstance(value, bool) and value > 0:
        return int(value)
    text = value if isinstance(value, str) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTkmgt]?)(i?)B\s*", text)
    bytes_ = 0 if match is None or (match[3] and not match[2]) else _bytes(*match.groups())
    if bytes_ < 1:
        raise OptionError(
            "`memory` is what a device has for the pipeline",
            expected='bytes above 0, as a whole number or as "16GiB" (2^30) or "80GB" (10^9)',
            found=shown(value),
        )
    return bytes_


def _bytes(number: str, unit: str, binary: str) -> int:
    """The bytes of a text such as 80 GB, exactly; 0 for a number that is too long to be one."""
    if len(number) > LONGEST_NUMBER:
        return 0
    power = " KMGT".index(unit.upper() or " ")
    return int(Fraction(number) * (1024 if binary else 1000) ** power)


def parse_devices(
    devices: int | Sequence[int | str | torch.device], *, elsewhere: bool
) -> tuple[torch.device, ...]:
    """The device of each stage.

    Args:
        devices: a number of accelerators (of CPU workers where there are none), or a list; an
            index in it is that of an accelerator, as in ``torch.device(0)``.
        elsewhere: the pipeline will run on another machine, so more devices than are here are
            allowed.

    Returns:
        One device for each stage, with its index.

    Raises:
        OptionError: it is neither a number above 0 nor a list with an entry.
        DeviceError: a device does not exist here.
    """
    present = accelerators()
    if isinstance(devices, int) and not isinstance(devices, bool):
        if devices < 1:
            raise OptionError(
                "a pipeline needs a device", expected="at least 1", found=shown(devices)
            )
        if devices > MOST_DEVICES:
            raise OptionError(
                "so many devices cannot be planned",
                expected=f"at most {MOST_DEVICES}",
                found=shown(devices),
            )
        if not present or (elsewhere and devices > len(present)):
            return (torch.device("cpu"),) * devices
        if devices > len(present):
            raise DeviceError(
                f"{devices} devices were asked for",
                found=f"{len(present)} GPU{'s' if len(present) > 1 else ''}",
                remedy=f'a list may name a GPU several times (devices=["{present[0]}",'
                f' "{present[0]}"] puts two stages on one), or name CPU workers (["cpu", "cpu"])',
            )
        return present[:devices]
    if isinstance(devices, (str, int)) or not isinstance(devices, Sequence):
        raise OptionError(
            "devices is a count or a list",
            expected='2, ["cuda:0", "cuda:1"] or [0, 1]',
            found=shown(devices),
        )
    if not devices:
        raise OptionError("a pipeline needs a device", expected="at least 1", found="an empty list")
    return tuple(
        _accelerator(d, len(devices))
        if isinstance(d, int) and not isinstance(d, bool)
        else _parse_device(d)
        for d in devices
    )


def _accelerator(index: int, count: int) -> torch.device:
    """The accelerator with an index, one of `count` devices that the user listed."""
    present = accelerators()
    if 0 <= index < len(present):
        return present[index]
    if not present:
        instead = f'devices={count}, or ["cpu"] * {count}: CPU workers (there is no GPU)'
    else:
        instead = f'"cpu", or an index from 0 to {len(present) - 1}'
    raise DeviceError("no GPU with this index here", expected=instead, found=shown(index))


def _parse_device(value: bool | str | torch.device) -> torch.device:
    """Parse one device, which must exist here, and add its index."""
    try:
        device = torch.device(str(value) if isinstance(value, bool) else value)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            "no such device", expected='"cpu" or "cuda:0"', found=shown(value)
        ) from error
    found = backend_of(device).find(device)
    if found is not None:
        return found
    present = accelerators()
    here = f' or "{present[0]}" … "{present[-1]}"' if present else " (there is no GPU)"
    raise DeviceError("no such device here", expected=f'"cpu"{here}', found=shown(str(value)))


BACKENDS = ("eager", "inductor", "cudagraphs")


def check_backend(backend: Any, mode: Any) -> None:
    """Check the options `backend` and `mode`.

    Raises:
        OptionError: one has no such value, or a mode for another backend than inductor.
    """
    if backend not in BACKENDS:
        expected = f"one of {', '.join(BACKENDS)}"
        raise OptionError("unknown backend", expected=expected, found=shown(backend))
    if mode is not None and backend != "inductor":
        raise OptionError(
            "a mode is for inductor only",
            found=f"mode={shown(mode)}, backend={shown(backend)}",
            remedy='add backend="inductor", or leave mode out',
        )
    if mode is not None and mode not in MODES:
        raise OptionError("unknown mode", expected=f"one of {', '.join(MODES)}", found=shown(mode))


def check_exact(exact: Any) -> None:
    """Check the option `exact`.

    Raises:
        OptionError: it is neither True nor False.
    """
    if not isinstance(exact, bool):
        raise OptionError("`exact`", expected="True or False", found=shown(exact))


def check_dynamic(dynamic: Any) -> None:
    """Check the option `dynamic`.

    Raises:
        OptionError: it is no dict of dicts from dimensions to names, or a name cannot be used.
    """
    if dynamic is None:
        return
    expected = 'dynamic={"input_ids": {1: "length"}}: argument → dimension → name, or None'
    if not isinstance(dynamic, dict):
        raise OptionError("dynamic is no dict", expected=expected, found=shown(dynamic))
    for argument, dims in dynamic.items():
        if not isinstance(argument, str) or not isinstance(dims, dict):
            raise OptionError(
                "dynamic does not name dimensions of arguments",
                expected=expected,
                found=f"{shown(argument)}: {shown(dims)}",
            )
        for dim, name in dims.items():
            valid = name is None or (isinstance(name, str) and is_identifier(name))
            if not isinstance(dim, int) or isinstance(dim, bool) or not valid or name in RESERVED:
                raise OptionError(
                    f"dynamic does not name a dimension of {argument}",
                    expected=f"{expected}; the name an identifier that is not used for something"
                    " else",
                    found=f"{shown(dim)}: {shown(name)}",
                )


def check_count(name: str, value: Any, of_what: str) -> None:
    """Check that an option is an integer of at least 1.

    Args:
        name: of the option.
        value: what the user wrote.
        of_what: what it counts.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        chosen = ", or None: the planner chooses" if name == "chunks" else ""
        raise OptionError(
            f"{name} is the number of {of_what}",
            expected=f"an integer of at least 1{chosen}",
            found=shown(value),
        )
