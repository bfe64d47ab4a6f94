"""Compare traced stages with estimates: by how many bytes the estimates were too low."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autopipe.passes.split import estimate_stages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autopipe.passes.ir import Split
    from autopipe.passes.remat_policies import RematPolicy
    from autopipe.passes.split import Objective
    from autopipe.planning.fitting import FittedCut

    StagePolicy = tuple[int, RematPolicy]


def underestimated_bytes(
    split: Split, objective: Objective, found: FittedCut
) -> dict[StagePolicy, int]:
    """Return the bytes by which each stage's estimate was too low, with each policy tried.

    Args:
        split: a cut.
        objective: the objective that it was cut for.
        found: the plans of the cut.

    Returns:
        (stage, policy) → bytes; negative where the estimate was too high.
    """
    most = max(map(len, found.tried))
    columns = [[*tried, *[[*tried][-1]] * (most - len(tried))] for tried in found.tried]
    errors = {}
    for policies in zip(*columns, strict=True):  # (the last again where a stage tried fewer)
        estimate = estimate_stages(split, replace(objective, remat=policies)).nbytes
        for k, policy in enumerate(policies):
            errors[k, policy] = found.tried[k][policy].memory_bytes - estimate[k]
    return errors


def corrections_for(
    objective: Objective, errors: Mapping[StagePolicy, int]
) -> dict[StagePolicy, int]:
    """Return a correction for each stage's policies; for an untried one, the nearest one's.

    Args:
        objective: has the stages and policies.
        errors: what `underestimated_bytes` returned.
    """
    corrections = {}
    for k in range(objective.stages):
        tried = [policy for stage, policy in errors if stage == k]
        for policy in objective.policies(k) if tried else ():
            nearest = min(tried, key=lambda one: abs(one.rank - policy.rank))
            corrections[k, policy] = errors[k, nearest]
    return corrections
