"""Let stages offload what they save instead of recomputing it, where that makes the step shorter.

Offloading takes no time where copies hide behind computation, and as long as the link where they do
not. So it has no place among policies ordered by recomputation: it is tried once these are chosen.
The simulator decides, since what hides depends on schedule, stages and links together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autopipe.passes.remat_policies import LADDER, POLICIES, parse_policy
from autopipe.planning.fitting import missing_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.planning.fitting import FittedCut, MakeCandidate
    from autopipe.planning.plans import Plan


def try_offloading(make: MakeCandidate, found: FittedCut, able: Sequence[bool]) -> FittedCut:
    """Try to offload in the stages that recompute: in all, in the better half of them, and so on.

    Args:
        make: plans the cut with a policy per stage.
        found: the plans of the cut with policies of the ladder.
        able: for each stage, whether its device has a link to the host.

    Returns:
        `found`, with a faster candidate if one fits; if `found` does not fit, with one that does.
    """
    offload = next((p for p in POLICIES if p.least_offloaded is not None), None)
    own = [parse_policy(stage.remat) or LADDER[0] for stage in found.chosen.plan.stages]
    chosen = [k for k, policy in enumerate(own) if policy != LADDER[0] and able[k]]
    tried = [found.chosen]
    while chosen and offload is not None:
        tried.append(make([offload if k in chosen else p for k, p in enumerate(own)]))
        if len(tried) == 2:
            chosen = sorted(chosen, key=lambda k: _share_of_link(tried[1].plan, k))
        chosen = chosen[: len(chosen) // 2]
    fitting = [one for one in tried if one.fits]
    best = min(fitting, key=lambda one: one.plan.step_seconds, default=found.chosen)
    return replace(found, chosen=best)


def _share_of_link(plan: Plan, k: int) -> tuple[bool, float]:
    """Orders stages by how well copies hide behind their work; those that do not fit come last."""
    stage = plan.stages[k]
    seconds = stage.seconds
    share = stage.times[0].offload / seconds if seconds else float("inf")
    return missing_bytes(stage) > 0, share
