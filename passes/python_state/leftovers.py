"""Find tensors of a finished trace that the model still holds.

A fake tensor that a model keeps (in a cache, a list, a global) breaks every later call of the model
itself. `PythonState` restores what it can reach. What still lives afterwards is refused here, with
the place that holds it.
"""

from __future__ import annotations

import functools
import gc
import sys
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
        if name := _variable_of(level) or _cache_of(level):
            return name
        seen |= {id(x) for x in level} | {id(level)}
        referrers = gc.get_referrers(*level)
        level = [x for x in referrers if id(x) not in seen and not isinstance(x, types.FrameType)]
        if not level:
            break
    return None


def _variable_of(values: list[Any]) -> str | None:
    """The name of a variable of a Python module that has one of some values."""
    ids = {id(x) for x in values}
    for name, module in list(sys.modules.items()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in ids:
                return f"{name}.{key}"
    return None


def _cache_of(values: list[Any]) -> str | None:
    """The name of a function among some values, which holds tensors in its cache or closure."""
    for value in values:
        if isinstance(value, (types.FunctionType, functools._lru_cache_wrapper)):
            return f"{value.__module__}.{value.__qualname__}"
    return None
