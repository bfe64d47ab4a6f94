"""The holder for a value: which kind of container or object it is."""

from __future__ import annotations

import contextvars
import types
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy
from torch import Tensor

from .holders import CONTENT, Context, Dict, Holder, Namespace, Sequence, Slots, TooLarge, slots_of

if TYPE_CHECKING:
    from collections.abc import Hashable

LARGEST_ARRAY = 1 << 20
"""Bytes of an array that are compared; of a larger one, only its identity."""


class Array(Holder):
    """A numpy array."""

    def read(self) -> dict[Hashable, Any]:
        """Copy the contents."""
        if self.owner.nbytes > LARGEST_ARRAY:
            return {CONTENT: TooLarge}
        if self.owner.dtype.hasobject:
            return {CONTENT: tuple(self.owner.flat)}
        return {CONTENT: self.owner.tobytes()}

    def write(self, key: Hashable, value: Any) -> None:
        """Refill it, unless it was too large to be copied."""
        if value is TooLarge:
            return
        if isinstance(value, tuple):
            for n, item in enumerate(value):
                self.owner.flat[n] = item
        else:
            self.owner[...] = numpy.frombuffer(value, self.owner.dtype).reshape(self.owner.shape)

    def name_of(self, key: Hashable) -> str:
        return self.label


class Memory(Array):
    """Another object that is a piece of memory: bytearray, array, memoryview, of ctypes."""

    def read(self) -> dict[Hashable, Any]:
        with memoryview(self.owner) as memory:
            large = memory.nbytes > LARGEST_ARRAY
            return {CONTENT: TooLarge if large else memory.tobytes()}

    def write(self, key: Hashable, value: Any) -> None:
        """Refill it, unless it was too large, cannot be written to, or has another size now."""
        if value is TooLarge:
            return
        if isinstance(self.owner, bytearray):  # its size may have changed
            self.owner[:] = value
            return
        with memoryview(self.owner) as memory, memory.cast("B") as entries:
            if not entries.readonly and entries.nbytes == len(value):
                entries[:] = value


class View(Holder):
    """A mapping whose own dict is out of reach; it is compared only."""

    def read(self) -> dict[Hashable, Any]:
        return dict(self.owner)

    def write(self, key: Hashable, value: Any) -> None:
        """Change nothing."""

    def name_of(self, key: Hashable) -> str:
        return f"{self.label}[{key!r}]"


def container_of(value: Any, label: str) -> Holder | None:
    """The holder for a container, or None for a value of another kind."""
    if isinstance(value, dict):
        return Dict(value, label)
    if isinstance(value, (list, deque, set)):
        return Sequence(value, label)
    if isinstance(value, types.MappingProxyType):
        return View(value, label)
    if isinstance(value, numpy.ndarray):
        return Array(value, label)
    if isinstance(value, contextvars.ContextVar):
        return Context(value, label)
    return Memory(value, label) if _is_memory(value) else None


def _is_memory(value: Any) -> bool:
    if isinstance(value, (bytes, numpy.generic)):
        return False
    try:
        memoryview(value).release()
    except (TypeError, ValueError):  # it has no memory, or gave it back
        return False
    return True


def objects_of(value: Any, label: str) -> list[Holder]:
    """The holders for an object's attributes: those of its dict, and those of its slots."""
    if isinstance(value, (Tensor, type, types.ModuleType, types.FunctionType)):
        return []
    found: list[Holder] = []
    if isinstance(own_dict(value), dict):
        found.append(Namespace(value, label))
    if slots_of(value):
        found.append(Slots(value, label))
    return found


def own_dict(value: Any) -> Any:
    """An object's ``__dict__``; None if it has none."""
    try:
        return getattr(value, "__dict__", None)
    except Exception:  # its own ``__getattr__`` raises another error
        return None
