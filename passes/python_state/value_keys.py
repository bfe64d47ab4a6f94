"""Keys by which Python values are compared: equal keys mean that a capture would not notice."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import types
import weakref
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

PLAIN = (
    *(bool, int, str, bytes, type(None), type(Ellipsis), range),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size),
    *(fractions.Fraction, decimal.Decimal, datetime.date, datetime.timedelta, pathlib.PurePath),
    *(numpy.dtype, enum.Enum),
)
"""Immutable types whose equality means that nothing can tell two values apart."""

DEEPEST = 8


class Identity:
    """A key that is equal only for the same object, which it keeps alive.

    Args:
        value: the object.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class WeakIdentity:
    """A key that is equal only for the same object, as long as that lives.

    Args:
        value: the object. (An id alone may be another object's later.)
    """

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        self._kept: Any = None
        self._value: Callable[[], Any] | None = None
        try:
            self._value = weakref.ref(value)
        except TypeError:  # it has no weak references
            self._kept = value

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        same = isinstance(other, WeakIdentity) and self._id == other._id
        return same and self._lives() and other._lives()  # type: ignore[attr-defined]

    def _lives(self) -> bool:
        return self._value is None or self._value() is not None

    def __hash__(self) -> int:
        return self._id

    def __repr__(self) -> str:
        value = self._kept if self._value is None else self._value()
        return "object" if value is None else type(value).__name__


def value_key(value: Any, depth: int = 0, *, objects: bool = False) -> Hashable:
    """Return a key for a value: its content as far as that can be compared, else its identity.

    Args:
        value: any value.
        depth: how many containers it is inside of.
        objects: compare objects by their attributes; else by identity.
    """
    content = _content_key(value, depth, objects=objects)
    return (content, own) if objects and (own := extra_key(value)) else content


def extra_key(value: Any) -> Hashable:
    """Return a key for the public, plain attributes of a number, text or container; () if none.

    Args:
        value: any value; one of Python's own classes has no attributes.
    """
    if not isinstance(value, CONTENTS) or isinstance(value, enum.Enum):
        return ()
    own = vars(value) if hasattr(value, "__dict__") else {}
    return tuple(
        (n, _content_key(v, 0, objects=False))
        for n, v in own.items()
        if isinstance(n, str) and not n.startswith("_") and isinstance(v, (*PLAIN, float, complex))
    )


CONTENTS = (int, float, complex, str, bytes, list, tuple, set, frozenset, dict, deque)


def _content_key(value: Any, depth: int, *, objects: bool) -> Hashable:
    kind: Any = type(value)
    if isinstance(value, (float, complex)):  # 0.0 is not -0.0, and nan is itself
        return kind, complex.__repr__(complex(value))
    if isinstance(value, numpy.generic):
        return kind, value.tobytes()
    if isinstance(value, PLAIN):
        return kind, value
    if depth > DEEPEST or isinstance(value, (Tensor, type, types.ModuleType)):
        return Identity(value)
    deeper = functools.partial(value_key, depth=depth + 1, objects=objects)
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
        cells = (_cell(c, depth + 2) for c in value.__closure__ or ())
        return kind, value.__code__, deeper(value.__defaults__), *cells
    if isinstance(value, types.MethodType):
        return kind, deeper(value.__func__), Identity(value.__self__)
    if isinstance(value, functools.partial):
        return kind, deeper(value.func), deeper(value.args), deeper(value.keywords)
    if objects and is_made_of_attributes(value):
        return kind, *((n, deeper(getattr(value, n))) for n in attribute_names(value))
    return Identity(value)


def attribute_names(value: Any) -> list[str]:
    """Names of an object's own attributes: those of its dict, then its slots."""
    names = dict.fromkeys(getattr(value, "__dict__", ()))
    slots = [s for k in type(value).__mro__ for s in _slots(k)]
    return [*names, *(s for s in slots if s not in names and hasattr(value, s))]


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    found = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(s for s in found if s not in ("__dict__", "__weakref__"))


def module_name(kind: type) -> str:
    """The Python module of a class; empty where the class does not tell.

    Cython's function type has a slot of that name for its instances.
    """
    name: object = kind.__module__
    return name if isinstance(name, str) else ""


def is_made_of_attributes(value: Any) -> bool:
    """Whether nothing but its class and its attributes makes an object what it is."""
    kind: Any = type(value)
    if kind is types.SimpleNamespace:
        return True
    if kind.__new__ is not object.__new__ or issubclass(kind, (BaseException, nn.Module)):
        return False
    root = module_name(kind).partition(".")[0]
    foreign = root in ("torch", "numpy", "builtins", "functools", "weakref", "_thread")
    own = not foreign or module_name(kind).startswith("torch.distributions")
    return own and bool(attribute_names(value) or hasattr(value, "__dict__"))


def _cell(cell: types.CellType, depth: int) -> Hashable:
    try:
        return value_key(cell.cell_contents, depth)
    except ValueError:  # it is empty
        return "empty"


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
