"""TODO."""

from __future__ import annotations

from .combine_outputs import CombinedGraph, combine
from .lattice import STATIC, Reduced
from .numeric_trial import settle
from .propagate import follow

__all__ = [
    "STATIC",
    "CombinedGraph",
    "Reduced",
    "combine",
    "follow",
    "settle",
]
