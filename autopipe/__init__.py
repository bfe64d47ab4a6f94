"""autopipe: any PyTorch model as a micro-batch pipeline, in one line."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from autopipe import errors, logs
from autopipe.version import __version__ as __version__

if TYPE_CHECKING:
    from autopipe.api import compile, explain_captures, plan
    from autopipe.module import Pipeline
    from autopipe.passes.partition import CostGraph, DeviceSpec, Partition, partition
    from autopipe.passes.schedule import (
        Scheduled,
        Timeline,
        clock_table,
        read_schedule,
        simulate,
        write_schedule,
    )
    from autopipe.planning.measured import Measured
    from autopipe.planning.plans import Plan

# In a checkout, `passes` is a symbolic link. Git for Windows, and archives unpacked there, leave a
# text file with the link's target in its place.
if os.path.isfile(os.path.join(os.path.dirname(__file__), "passes")):
    raise ImportError(
        "this checkout of autopipe lacks a symbolic link: autopipe/passes is a text file\n"
        "  what to do: turn on Windows' developer mode (it allows links), then run in the checkout"
        " `git config core.symlinks true` and `git checkout -- autopipe/passes`; or install a"
        " wheel with pip, which has no link"
    )

logs.configure(os.environ)

__all__ = [
    "CostGraph",
    "DeviceSpec",
    "Measured",
    "Partition",
    "Pipeline",
    "Plan",
    "Scheduled",
    "Timeline",
    "clock_table",
    "compile",
    "errors",
    "explain_captures",
    "partition",
    "plan",
    "read_schedule",
    "simulate",
    "write_schedule",
]

# Names are imported on first use (PEP 562), because torch takes seconds to import, and a
# simulation, a report page or `autopipe --help` does not need it.
_HOMES = {
    "api": ("compile", "explain_captures", "plan"),
    "module": ("Pipeline",),
    "passes.partition": ("CostGraph", "DeviceSpec", "Partition", "partition"),
    "passes.schedule": (
        *("Scheduled", "Timeline", "clock_table", "read_schedule", "simulate", "write_schedule"),
    ),
    "planning.measured": ("Measured",),
    "planning.plans": ("Plan",),
}


_NEED_TORCH = ("api", "module", "planning.measured")


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            if home in _NEED_TORCH:
                import_module("autopipe.torch_version").check_torch()
            value: object = getattr(import_module(f"autopipe.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'autopipe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
