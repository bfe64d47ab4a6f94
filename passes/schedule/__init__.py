"""TODO."""

from __future__ import annotations

from .actions import Action, Scheduled
from .kinds import KNOWN, schedule, stages_per_device
from .simulator import play_out, simulate
from .timeline import Span, Timeline

__all__ = [
    "KNOWN",
    "Action",
    "Scheduled",
    "Span",
    "Timeline",
    "play_out",
    "schedule",
    "simulate",
    "stages_per_device",
]
