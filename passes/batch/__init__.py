"""TODO."""

from __future__ import annotations

from .combine_outputs import Combined, combine
from .lattice import STATIC, Reduced
from .numeric_trial import settle
from .propagate import follow

__all__ = [
    "STATIC",
    "Combined",
    "Reduced",
    "combine",
    "follow",
    "settle",
]
