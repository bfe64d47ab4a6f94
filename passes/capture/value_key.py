"""Keys by which Python values are compared: equal keys mean that a capture would not notice."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import types
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Hashable

PLAIN = (
    *(bool, int, str, bytes, type(None), type(Ellipsis), range),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size),
    *(fractions.Fraction, decimal.Decimal, datetime.date, datetime.timedelta, pathlib.PurePath),
    *(numpy.dtype, enum.Enum),
)
"""Immutable types whose equality means that nothing can tell two values apart."""

DEEPEST = 8


def value_key(value: Any, depth: int = 0) -> Hashable:
    """Return a key for a value: its content as far as that can be compared, else its identity.

    The identity is meaningful only as long as the value lives.
    """
    kind: Any = type(value)
    if isinstance(value, (float, complex, numpy.generic)):
        return kind, repr(value)  # tells 0.0 from -0.0, and nan is itself
    if isinstance(value, PLAIN):
        return kind, value
    if depth > DEEPEST or isinstance(value, (Tensor, type, types.ModuleType)):
        return "is", id(value)
    deeper = functools.partial(value_key, depth=depth + 1)
    if isinstance(value, slice):
        return kind, deeper(value.start), deeper(value.stop), deeper(value.step)
    if isinstance(value, (list, tuple, deque)):
        return kind, *map(deeper, value)
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(deeper, value))
    if isinstance(value, dict):
        value = raw_dict(value)
    if isinstance(value, Mapping):
        return kind, *((deeper(k), deeper(v)) for k, v in value.items())
    if isinstance(value, bytearray):
        return kind, bytes(value)
    if isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, types.FunctionType):
        cells = (c.cell_contents for c in value.__closure__ or ())
        return kind, value.__code__, deeper(value.__defaults__), *map(deeper, cells)
    if isinstance(value, types.MethodType):
        return kind, deeper(value.__func__), id(value.__self__)
    if isinstance(value, functools.partial):
        return kind, deeper(value.func), deeper(value.args), deeper(value.keywords)
    return "is", id(value)


def raw_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    """Copy a dict past what a subclass makes of its entries when they are read."""
    return {k: dict.__getitem__(value, k) for k in dict.keys(value)}


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are equal plain data, or containers of the same objects."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)) and len(a) == len(b) and all(map(_is, a, b)):
        return True
    return value_key(a) == value_key(b)


def _is(a: Any, b: Any) -> bool:
    return a is b
