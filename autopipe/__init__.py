"""autopipe: any PyTorch model as a micro-batch pipeline, in one line."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from autopipe import errors

if TYPE_CHECKING:
    from autopipe.api import compile, plan
    from autopipe.module import Pipeline
    from autopipe.passes.partition import CostGraph, DeviceSpec, Partition, partition
    from autopipe.passes.schedule import Timeline, simulate
    from autopipe.planning.plans import Plan

__version__ = "0.1.0"

__all__ = [
    "CostGraph",
    "DeviceSpec",
    "Partition",
    "Pipeline",
    "Plan",
    "Timeline",
    "compile",
    "errors",
    "partition",
    "plan",
    "simulate",
]

# Names are imported on first use (PEP 562), because torch takes seconds to import, and a
# simulation, a report page or `autopipe --help` does not need it.
_HOMES = {
    "api": ("compile", "plan"),
    "module": ("Pipeline",),
    "passes.partition": ("CostGraph", "DeviceSpec", "Partition", "partition"),
    "passes.schedule": ("Timeline", "simulate"),
    "planning.plans": ("Plan",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(f"autopipe.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'autopipe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
