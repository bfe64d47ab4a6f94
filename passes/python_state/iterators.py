"""Iterators that a forward advances: a captured graph would repeat what they gave once."""

from __future__ import annotations

import pickle
import types
import warnings
from typing import TYPE_CHECKING, Any

from autopipe.errors import CaptureError

from .random_numbers import AVOIDING_OPTIONS
from .value_keys import value_key

if TYPE_CHECKING:
    from collections.abc import Hashable


def iterator_state(value: Any) -> Hashable | None:
    """Return the state of an iterator; it is another one after a step.

    Args:
        value: a generator, or an iterator of Python's own.

    Returns:
        None: it has a state that cannot be read, or is an object of another class.
    """
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return "finished" if frame is None else (frame.f_lasti, value_key(dict(frame.f_locals)))
    if type(value).__module__ not in ("itertools", "builtins"):
        return None
    try:
        return _pickled(value)
    except Exception:  # a file; an iterator over what cannot be pickled
        return None


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except DeprecationWarning:  # of itertools, from Python 3.12 on, where warnings are errors
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return pickle.dumps(value)


def iterator_error(name: str) -> CaptureError:
    """Return the error for an iterator that a forward advances.

    Args:
        name: where it was found.
    """
    return CaptureError(
        "the forward advances an iterator: what it gave now would become a constant",
        found=name,
        remedy=f"take the next value outside of the model, and pass it in; {AVOIDING_OPTIONS}",
    )
