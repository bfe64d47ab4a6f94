"""CPU workers: threads of this process, each on its own cores if there are enough."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from .base import Backend


class CpuBackend(Backend):
    """The host. Operators are synchronous; tensors pass between threads without a copy."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def devices(self) -> tuple[torch.device, ...]:
        return (torch.device("cpu"),)

    def find(self, device: torch.device) -> torch.device | None:
        return torch.device("cpu")

    def name(self, device: torch.device) -> str:
        """The processor's model and the number of threads that one operator uses."""
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
        model = found[1].strip() if found else platform.processor() or platform.machine()
        return f"{model}, {torch.get_num_threads()} threads"
