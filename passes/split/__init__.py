"""Split: choose a stage for every op and extract the stage graphs.

In: `Annotated`, a captured graph with the costs of its ops; an `Objective`: devices, micro-batch
size, policies and limits; or the `PlannedCut` that a plan stores.

Out: `Split`: K stage graphs, the routes of the values between them, and estimates of the stages.

Files, in reading order:

- `cut`: `split`, which runs the steps
- `allowed_cuts`: where the user allows cuts
- `objective`: what a cut is optimized for
- `op_costs`: per-op costs at the planned micro-batch size, the terms of all estimates
- `min_cut_estimate`: what a min-cut is estimated to save and recompute
- `stage_loads`: cost tables for the exact cut of one order of the ops
- `stage_estimate`: the same sums for any assignment of ops to stages
- `op_groups`: ops that must stay in one stage, and orders of them
- `assign_stages`: choose the order and the cut
- `relocate_ops`: move ops near the inputs to where they cost least
- `duplicate_ops`: compute cheap values in each stage that needs them
- `replay_plan`: find the cut that a plan stores
- `follow_cut`: follow the cut of another capture of the same model
- `reorder`: reorder the program so that its stages are runs of ops
- `extract_stages`: build the stage graphs and routes
- `stage_modules`: the modules that stages compute
"""

from __future__ import annotations

from .allowed_cuts import CutAt
from .cut import split
from .follow_cut import EarlierCut
from .objective import Objective, objective_of
from .op_costs import OpCosts
from .replay_plan import PlannedCut, planned_cut_of
from .stage_estimate import estimate_stages
from .stage_modules import modules_by_stage

__all__ = [
    "CutAt",
    "EarlierCut",
    "Objective",
    "OpCosts",
    "PlannedCut",
    "estimate_stages",
    "modules_by_stage",
    "objective_of",
    "planned_cut_of",
    "split",
]
