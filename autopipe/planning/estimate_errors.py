"""What the traces of a cut's stages show of its estimate: by how many bytes it was too low."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autopipe.passes.split import estimate_stages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autopipe.passes.ir import Split
    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.passes.split import Objective
    from autopipe.planning.fitting import Fitted


def missed_bytes(
    split: Split, objective: Objective, found: Fitted
) -> dict[tuple[int, RematPolicy], int]:
    """By how much the estimate of a cut's stages was too low, with the policies that were tried."""
    most = max(map(len, found.tried))
    rows = [[*tried, *[[*tried][-1]] * (most - len(tried))] for tried in found.tried]
    missed = {}
    for policies in zip(*rows, strict=True):  # (the last again where a stage tried fewer)
        estimate = estimate_stages(split, replace(objective, remat=policies)).nbytes
        for k, policy in enumerate(policies):
            missed[k, policy] = found.tried[k][policy].memory_bytes - estimate[k]
    return missed


def spread(
    objective: Objective, missed: Mapping[tuple[int, RematPolicy], int]
) -> dict[tuple[int, RematPolicy], int]:
    """What the estimate missed, for a policy that was not tried that of the nearest one."""
    found = {}
    for k in range(objective.stages):
        known = [policy for stage, policy in missed if stage == k]
        for policy in objective.policies(k) if known else ():
            nearest = min(known, key=lambda one: abs(one.rank - policy.rank))
            found[k, policy] = missed[k, nearest]
    return found
