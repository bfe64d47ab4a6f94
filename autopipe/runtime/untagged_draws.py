"""Refuse operators of other libraries that draw random numbers without saying so.

A tagged operator draws by a key (`random`), so a recomputation repeats its numbers. One without the
tag ``nondeterministic_seeded`` draws new numbers whenever it runs, and its gradient would belong to
other numbers than its result. Nothing tells beforehand: so the generators are compared before and
after calls of such an operator, until it has drawn nothing often enough.
"""

from __future__ import annotations

import sys
import threading
from random import getstate
from typing import TYPE_CHECKING, Any

import torch

from autopipe.errors import UnsupportedError

from .backends import backend_of

if TYPE_CHECKING:
    from collections.abc import Hashable
    from contextlib import AbstractContextManager

TRUSTED = 32
"""After so many calls of an operator, with the same numbers and flags, it is compared no more."""

MOST_REMEMBERED = 10_000
"""Calls that are counted; with more different ones, counting starts anew."""

TRIES = 3
"""How often a generator must have moved: once may have been another thread's doing."""


def call_watched(
    op: Any,
    device: torch.device,
    quiet: AbstractContextManager[Any] | threading.Lock,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call an operator, and refuse it if it draws random numbers.

    Args:
        op: an operator without the tag.
        device: where it runs.
        quiet: is entered to compare again; no stage uses the default generators meanwhile.
        args, kwargs: its arguments.

    Returns:
        What it returns.

    Raises:
        UnsupportedError: it draws from a default generator of torch, `random` or NumPy.
    """
    plain = (x for x in (*args, *kwargs.values()) if isinstance(x, PLAIN))
    call = (op, device, *((type(x), x) for x in plain))
    if _quiet_calls.get(call, 0) >= TRUSTED:
        return op(*args, **kwargs)
    before = _states(device)
    result = op(*args, **kwargs)
    moved = _moved(before, _states(device))
    if moved is None:
        _count(call)
        return result
    with quiet:
        for _ in range(TRIES - 1):
            before = _states(device)
            op(*args, **kwargs)
            moved = _moved(before, _states(device))
            if moved is None:
                _count(call)
                return result
    raise UnsupportedError(
        "an operator draws random numbers, but does not say so: its backward would not meet the"
        " numbers of its forward",
        node=str(op),
        found=f"it draws from {moved}",
        remedy="draw with torch's operators only, and tag it:"
        " torch.library.custom_op(..., tags=torch.Tag.nondeterministic_seeded)",
    )


PLAIN = (int, float, bool, str, type(None))
_quiet_calls: dict[Hashable, int] = {}


def _count(call: Hashable) -> None:
    """Count a call that drew nothing."""
    if len(_quiet_calls) > MOST_REMEMBERED:
        _quiet_calls.clear()
    _quiet_calls[call] = _quiet_calls.get(call, 0) + 1


def _states(device: torch.device) -> dict[str, Any]:
    """The states of the generators that belong to the process."""
    states: dict[str, Any] = {"torch's default generator": torch.default_generator.get_state()}
    if device.type != "cpu":
        states[f"the generator of {device}"] = (
            backend_of(device).default_generator(device).get_state()
        )
    states["Python's random"] = getstate()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        kind, keys, *rest = numpy.get_state(legacy=True)
        states["numpy.random"] = (kind, keys.tobytes(), *rest)
    return states


def _moved(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The name of a generator whose state has changed, or None."""
    for name, old in before.items():
        new = after[name]
        same = torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
        if not same:
            return name
    return None
