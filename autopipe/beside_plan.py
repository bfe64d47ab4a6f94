"""Check the options that are given beside a plan: a plan has chosen them already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopipe import option_parsing
from autopipe.errors import OptionError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.planning.plans import Plan


def devices_beside_plan(
    plan: Plan,
    devices: int | Sequence[int | str | torch.device] | None,
    chunks: int | None,
    schedule: Any,
    virtual_stages: int | None,
    remat: Any,
    memory: Any,
    cut_at: Any,
) -> Any:
    """Check that the other options agree with a plan (devices: in number).

    Args:
        plan: what was given beside them.
        devices, chunks, schedule, virtual_stages, remat, memory, cut_at: as for `compile`.

    Returns:
        The devices: those given, or the number of the plan's.

    Raises:
        OptionError: an option is not the plan's.
    """
    K, stages = plan.devices, len(plan.stages)
    asked = devices if isinstance(devices, int) or devices is None else len(devices)
    policies = tuple(option_parsing.policy(s.remat) for s in plan.stages)
    pairs: dict[str, tuple[Any, Any]] = {
        "devices": (asked, K),
        "chunks": (chunks, plan.chunks),
        "schedule": (schedule, plan.schedule),
        "virtual_stages": (virtual_stages, plan.order.virtual_stages),
    }
    if remat is not None and _by_stage(plan, option_parsing.policies(remat, K, stages)) != policies:
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


def known_devices(devices: Any) -> Any:
    """Check that devices are given, by a plan or beside it, and return them.

    Args:
        devices: what `devices_beside_plan` returned, or as for `compile`.

    Raises:
        OptionError: they are not.
    """
    if devices is None:
        expected = "devices=8, or a plan that says how many"
        raise OptionError("a pipeline needs devices", expected=expected, found="devices=None")
    return devices


def _by_stage(
    plan: Plan, policies: tuple[RematPolicy, ...] | None
) -> tuple[RematPolicy, ...] | None:
    if policies is None or len(policies) == len(plan.stages):
        return policies
    return tuple(policies[home] for home in plan.order.homes)
