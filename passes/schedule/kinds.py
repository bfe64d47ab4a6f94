"""K, M and a name → `Scheduled`: the schedules that there are, and where their stages live.

The orders stand in `orders`, the program type in `scheduled`. What is added here is the choice,
and rematerialization, which goes with every B: as the first part of its action, or (early) as an
action of its own before it, which needs no gradient and so can run while the device waits for one.
"""

from __future__ import annotations

from collections.abc import Callable

from autopipe.errors import OptionError

from . import orders
from .actions import Action, Scheduled

__all__ = ["KNOWN", "Action", "Scheduled", "schedule", "stages_per_device"]

_ORDERS: dict[str, Callable[[int, int, int], list[list[orders.RawAction]]]] = {
    "gpipe": lambda K, M, v: orders.gpipe(K, M),
    "1f1b": orders.interleaved,
    "interleaved": orders.interleaved,
    "zb-h1": lambda K, M, v: orders.zero_bubble(K, M, 1),
    "zb-h2": lambda K, M, v: orders.zero_bubble(K, M, 2),
    "zb-v": lambda K, M, v: orders.zb_v(K, M),
}
KNOWN = tuple(_ORDERS)


def schedule(
    kind: str,
    stages: int,
    chunks: int,
    *,
    backward: bool = True,
    early_recompute: bool = False,
    virtual_stages: int | None = None,
) -> Scheduled:
    """The actions of one step on K devices.

    Stage k is on device k, but for the kinds that cut each device's share of the model in v: there
    the result has vK stages.

    - "gpipe" (arXiv 1811.06965, section 2.2): all micro-batches forward, then all backward.
    - "1f1b" (PipeDream-Flush, arXiv 2006.09503): a backward as soon as there can be one; stage k
      runs min(K - 1 - k, M) forwards to fill the pipeline, then alternates.
    - "interleaved" (arXiv 2104.04473, section 2.2): the same, stage s on device s mod K.
    - "zb-h1", "zb-h2" (arXiv 2401.10241, section 2): B and W apart, W where the device would wait,
      with 1F1B's memory or with that of 2K - 1 micro-batches.
    - "zb-v" (the same, section 6; arXiv 2405.15362): with 1F1B's memory, stages k and 2K - 1 - k on
      device k.

    Args:
        kind: one of `KNOWN`.
        stages: K >= 1, one per device (v per device for "interleaved" and "zb-v").
        chunks: M >= 1 micro-batches.
        backward: False leaves the forward actions only (inference).
        early_recompute: R is an action of its own before each B, not a part of it.
        virtual_stages: v, the stages per device: 2 if None, for "interleaved" any number >= 1;
            "zb-v" has 2, the others 1.

    Raises:
        OptionError: an unknown kind, a count below 1, or a v that the kind does not have.
    """
    v = stages_per_device(kind, virtual_stages)
    for what, count in (("stages", stages), ("chunks", chunks)):
        if count < 1:
            raise OptionError("no such pipeline", expected=f"{what} >= 1", found=str(count))
    devices = []
    for row in _ORDERS[kind](stages, chunks, v):
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


def stages_per_device(kind: str, virtual_stages: int | None = None) -> int:
    """v for a kind of schedule, given what its user asked for; see `schedule`.

    Raises:
        OptionError: an unknown kind, or a v that it does not have.
    """
    if kind not in KNOWN:
        names = ", ".join(map(repr, KNOWN))
        raise OptionError("there is no such schedule", expected=f"one of {names}", found=repr(kind))
    if kind == "interleaved":
        v = 2 if virtual_stages is None else virtual_stages
        if v < 1:
            raise OptionError("`virtual_stages`", expected=">= 1", found=str(v))
        return v
    fixed = 2 if kind == "zb-v" else 1
    if virtual_stages not in (None, fixed):
        raise OptionError(
            f"`virtual_stages` of schedule {kind!r}", expected=str(fixed), found=str(virtual_stages)
        )
    return fixed
