"""Find tensors of a finished trace that the model still holds.

A fake tensor that a model keeps (in a cache, a list, a global) breaks every later call of the model
itself. `PythonState` restores what it can reach. What still lives afterwards is refused here, with
the place that holds it.
"""

from __future__ import annotations

import functools
import gc
import types
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autopipe.errors import CaptureError

if TYPE_CHECKING:
    import weakref
    from collections.abc import Iterable

DEEPEST = 6
"""How many references are followed from a tensor to the place that holds it."""


def refuse_leftovers(created: Iterable[weakref.ref[Tensor]]) -> None:
    """Check that the tensors of a trace are gone.

    Args:
        created: references to all that the forward created.

    Raises:
        CaptureError: some still live.
    """
    if all(ref() is None for ref in created):
        return
    gc.collect()
    alive = {id(t): t for ref in created if (t := ref()) is not None}
    if not alive:
        return
    count, place = len(alive), _holder_of([*alive.values()])
    alive.clear()
    raise CaptureError(
        "the forward keeps tensors of the capture, which have no values: later calls of the model"
        " itself would use them",
        found=f"{count} in {place}" if place else str(count),
        remedy="keep tensors in registered buffers only, and remove what was stored now before the"
        " model is called again",
    )


def _holder_of(tensors: list[Any]) -> str | None:
    """The named place that holds one of some tensors, directly or through containers."""
    seen = {id(tensors)}
    level: list[Any] = tensors
    for _ in range(DEEPEST):
        seen |= {id(x) for x in level}
        found = [
            x
            for x in gc.get_referrers(*level)
            if id(x) not in seen and not isinstance(x, types.FrameType) and x is not level
        ]
        for holder in found:
            if name := _name_of(holder, level):
                return name
        if not found:
            return None
        level = found
    return None


def _name_of(holder: Any, held: list[Any]) -> str | None:
    """The name of a variable or attribute, or of a function's cache."""
    if isinstance(holder, dict):
        ids = {id(x) for x in held}
        keys = [key for key, value in list(holder.items()) if id(value) in ids]
        if "__name__" in holder and keys:
            return f"{holder['__name__']}.{keys[0]}"
    if isinstance(holder, (types.FunctionType, functools._lru_cache_wrapper)):
        return f"{holder.__module__}.{holder.__qualname__}"
    return None
