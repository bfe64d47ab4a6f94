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

if TYPE_CHECKING:
    from collections.abc import Iterator

AVOIDING_OPTIONS = (
    "a library's model often has an option that avoids it (in transformers: layerdrop=0.0,"
    " apply_spec_augment=False, a problem_type that is stated)"
)
"""Part of a remedy: how to avoid what cannot be captured in a library's model."""

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

    (They are no C functions that a profiler sees. Other generators are found by their state.)
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


def restore_generator(generator: Any, state: Any) -> None:
    """Set one of the `GENERATORS` back.

    Args:
        generator: it.
        state: what `saved_generator` returned.
    """
    if isinstance(generator, random.Random):
        if state is not None:
            generator.setstate(state)
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state


def saved_generator(generator: Any) -> Any:
    """Copy the state of one of the `GENERATORS`; None if it has none."""
    if isinstance(generator, random.SystemRandom):
        return None
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, numpy.random.RandomState):
        return generator.get_state()
    return getattr(generator, "bit_generator", generator).state
