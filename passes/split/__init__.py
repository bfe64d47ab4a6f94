"""TODO."""

from __future__ import annotations

from .cut import split
from .objective import Objective, objective_of
from .replay_plan import PlannedCut, planned_cut_of
from .stage_estimate import taken_by

__all__ = [
    "Objective",
    "PlannedCut",
    "objective_of",
    "planned_cut_of",
    "split",
    "taken_by",
]
