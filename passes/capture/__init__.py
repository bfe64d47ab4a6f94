"""TODO."""

from __future__ import annotations

from .flat_module import register_dataclasses
from .model import capture
from .module_state import OWN, fill, held_buffers

__all__ = [
    "OWN",
    "capture",
    "fill",
    "held_buffers",
    "register_dataclasses",
]
