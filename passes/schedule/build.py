"""Build the `Scheduled` of a kind, K stages and M micro-batches.

The kind gives the order; rematerialization is added here. R runs with each B: as the first part of
its action, or (early) as an action of its own before it. An early R needs no gradient, so it can
run while the device waits for one.
"""

from __future__ import annotations

from autopipe.errors import OptionError

from .actions import Action, Scheduled
from .kinds import KINDS
from .schedule_kind import ScheduleKind


def schedule(
    kind: str,
    stages: int,
    chunks: int,
    *,
    backward: bool = True,
    early_recompute: bool = False,
    virtual_stages: int | None = None,
) -> Scheduled:
    """List what each of K devices runs in one training step.

    Stage k is on device k. Kinds with v stages per device cut the model into vK stages instead, and
    their order says on which device each stage is.

    Args:
        kind: a name in `KINDS`, which describes each kind.
        stages: K >= 1, the number of devices.
        chunks: M >= 1, the number of micro-batches.
        backward: False lists the forward actions only (inference).
        early_recompute: run R as an action of its own before each B, not as a part of it.
        virtual_stages: v, the stages per device; None: the default of the kind.

    Returns:
        The schedule, of vK stages.

    Raises:
        OptionError: an unknown kind, a count below 1, or a v that the kind does not have.
    """
    chosen = find_kind(kind)
    v = chosen.stages_per_device(virtual_stages)
    for what, count in (("stages", stages), ("chunks", chunks)):
        if count < 1:
            raise OptionError(f"too few {what}", expected=f"{what} >= 1", found=str(count))
    devices = []
    for row in chosen.order(stages, chunks, v):
        actions = []
        for letters, stage, m in row:
            if letters == "F":
                actions.append(Action("F", stage, m))
            elif backward and "B" in letters:
                parts = ("R", letters) if early_recompute else ("R" + letters,)
                actions += [Action(part, stage, m) for part in parts]
            elif backward:
                actions.append(Action(letters, stage, m))
        devices.append(tuple(actions))
    return Scheduled(kind, stages * v, chunks, tuple(devices))


def find_kind(name: str) -> ScheduleKind:
    """Look up a kind.

    Args:
        name: what the user wrote.

    Raises:
        OptionError: there is none; the error lists the names.
    """
    if name not in KINDS:
        names = ", ".join(map(repr, KINDS))
        raise OptionError("unknown schedule", expected=f"one of {names}", found=repr(name))
    return KINDS[name]
