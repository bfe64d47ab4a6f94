"""Random numbers that are not torch's: a captured graph would repeat them for ever."""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy

from autopipe.errors import CaptureError
from autopipe.passes.graph import is_user_file
from autopipe.passes.one_at_a_time import replaced

from .explain import AVOIDING_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

GENERATORS = (
    random.Random,
    numpy.random.Generator,
    numpy.random.RandomState,
    numpy.random.BitGenerator,
)
"""Generators whose numbers a graph cannot record."""


def random_error(name: str, source: str | None) -> CaptureError:
    """Return the error for a random number that would become a constant.

    Args:
        name: of the function that draws it.
        source: the line of the model.
    """
    return CaptureError(
        "a random number that is not torch's is drawn inside the model: it would become a constant",
        source=source,
        found=name,
        remedy=f"draw with torch (torch.rand) inside the model; {AVOIDING_OPTIONS}",
    )


@contextmanager
def numpy_refused() -> Iterator[None]:
    """Refuse the functions of `numpy.random` until exit, at the user's line.

    (They are no C functions that a profiler sees. Other generators are found by `generator_state`.)
    """

    def refusing(name: str, original: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(2)
            if is_user_file(caller.f_code.co_filename):
                line = f"{caller.f_code.co_filename}:{caller.f_lineno}"
                raise random_error(f"numpy.random.{name}", line)
            return original(*args, **kwargs)

        return refuse

    with ExitStack() as stack:
        for name, function in list(vars(numpy.random).items()):
            if isinstance(getattr(function, "__self__", None), numpy.random.RandomState) and (
                name not in ("seed", "get_state", "set_state")
            ):
                stack.enter_context(replaced(numpy.random, name, refusing(name, function)))
        yield


def generator_state(generator: Any) -> str:
    """Return the state of one of the `GENERATORS`; it is another one after a draw."""
    if isinstance(generator, random.Random):
        return "" if isinstance(generator, random.SystemRandom) else repr(generator.getstate())
    if isinstance(generator, numpy.random.RandomState):
        return repr(generator.get_state())
    return repr(getattr(generator, "bit_generator", generator).state)
