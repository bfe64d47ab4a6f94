"""Rematerialization policies: what F keeps for the backward, by name or by number.

    none      whatever the backward uses, as autograd does
    full      only what the stage received; the backward runs the forward again (GPipe, section 2.3)
    min-cut   what functorch's min-cut partitioner keeps: cheap calls run again, products are kept
    0.0..1.0  a fraction of what min-cut keeps beyond what the stage received: functorch's budget,
              whose knapsack repeats the calls that give the most bytes back for their FLOPs

A value that is not kept is made again (R), from what is. No torch.
"""

from __future__ import annotations

Policy = str | float
"""One of `POLICIES`, or a fraction from 0 (as "full") to 1 (as "min-cut")."""

POLICIES = ("full", "none", "min-cut")


def repeats(policy: Policy) -> float:
    """A number that grows with what a policy runs again: 0 "none", 1 "min-cut", 2 "full"."""
    numbers = {"none": 0.0, "min-cut": 1.0, "full": 2.0}
    return numbers[policy] if isinstance(policy, str) else 2.0 - policy


def policy_of(value: object) -> Policy | None:
    """What someone wrote as a policy: a name, a number from 0 to 1, or such a number as text.

    Returns:
        One of `POLICIES` or a number; None if it is neither.
    """
    if value in POLICIES:
        return str(value)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= 1 else None  # type: ignore[arg-type,operator]
