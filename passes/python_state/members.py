"""Holders of what is no attribute of the user's: code of functions, functions of libraries."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from .holders import Globals, Holder

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Sequence

FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
"""What a library's module is asked for; its other variables are its own affair."""

SPECIAL = frozenset(
    {"forward", "__call__", "__getattr__", "__getattribute__", "__len__", "__bool__", "__iter__"}
    | {"__next__", "__getitem__", "__contains__", "__enter__", "__exit__", "__missing__"}
    | {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__get__"}
    | {"__int__", "__float__", "__index__", "__neg__", "__pos__", "__abs__", "__invert__"}
    | {f"__{r}{n}__" for n in ("add", "sub", "mul", "truediv", "floordiv") for r in ("", "r", "i")}
    | {f"__{r}{n}__" for n in ("mod", "pow", "matmul", "and", "or", "xor") for r in ("", "r", "i")}
    | {"__str__", "__repr__", "__format__", "__new__", "__init__", "__post_init__"}
    | {"__instancecheck__", "__torch_function__", "__array__"}
)
"""Methods that code calls without naming them."""


class ForeignFunctions(Globals):
    """Functions and classes of a Python module that is torch's, numpy's or Python's own."""

    is_changed = False  # a capture replaces some of torch's

    def read(self) -> dict[Hashable, Any]:
        return {k: v for k, v in super().read().items() if isinstance(v, FUNCTIONS)}

    def present(self) -> Collection[Hashable]:
        return ()


class Members(Holder):
    """What Python's own classes keep besides: ``function.__code__``.

    Args:
        owner: the object.
        label: what messages call it.
        names: of these attributes.
    """

    is_changed = False

    def __init__(self, owner: Any, label: str, names: Sequence[str]) -> None:
        super().__init__(owner, label)
        self._members = names

    def read(self) -> dict[Hashable, Any]:
        return {n: getattr(self.owner, n, None) for n in self._members}

    def get(self, key: Hashable) -> Any:
        return getattr(self.owner, str(key), None)


def members_of(function: types.FunctionType) -> Holder:
    """The holder for what makes a function do what it does."""
    return Members(function, function.__qualname__, ("__code__", "__defaults__", "__kwdefaults__"))
