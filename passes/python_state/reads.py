"""`Reads`: the Python values that a forward read, to notice when they change."""

from __future__ import annotations

import operator
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .holders import CONTENT, Missing, TooLarge
from .members import ForeignFunctions
from .noted import Answers
from .value_keys import is_same, value_key

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Hashable, Mapping, Sequence

    from .ambient import CallModes
    from .arguments import ArgumentReads
    from .holders import Holder


class Read(NamedTuple):
    """What a forward read of one holder.

    Attributes:
        holder: it.
        values: those that existed.
        names: by which it may have asked for others, which did not exist; None: by any.
        sets: what it sets itself, by name.
    """

    holder: Holder
    values: dict[Hashable, Any]
    names: Container[Hashable] | None = ()
    sets: Mapping[Hashable, Any] = types.MappingProxyType({})


@dataclass(frozen=True, eq=False)
class _Watched:
    """Some values of one holder, as they were when the model was captured."""

    holder: Holder
    values: dict[Hashable, Any]
    names: Container[Hashable] | None
    sets: Mapping[Hashable, Any]
    """What the forward sets itself: a call of the model may have set it since."""
    keys: Mapping[Hashable, Hashable]
    """For each value its `value_key`: what a mutable one contained."""
    kind: type
    """The class of what holds them, which decides what its methods do."""
    present: Sequence[Hashable]
    """The names of all that existed, in order."""

    @classmethod
    def of(cls, read: Read) -> _Watched:
        holder, values, names, sets = read
        keys = {k: value_key(v) for k, v in values.items()}
        return cls(holder, values, names, sets, keys, type(holder.owner), list(holder.present()))

    def changed(self) -> str | None:
        holder = self.holder
        if type(holder.owner) is not self.kind:
            return f"{holder.label}.__class__"
        if (name := self._appeared()) is not None:
            return name
        for key, value in self.values.items():
            found = holder.get(key)
            if found is value:
                continue
            if isinstance(value, tuple) and isinstance(found, tuple) and _same_items(value, found):
                continue
            if value_key(found) != self.keys[key] and not self._is_set(key):
                return holder.name_of(key)
        return None

    def _is_set(self, key: Hashable) -> bool:
        """Whether a value is what the forward sets it to."""
        return key in self.sets and is_same(self.holder.get(key), self.sets[key])

    def _appeared(self) -> str | None:
        """The name of what the forward would find now, but did not exist, or was elsewhere."""
        now = self.holder.present()
        if self.names is not None and len(now) == len(self.present):
            # A name that is new is the last one.
            if not now or next(reversed(now)) is self.present[-1]:  # type: ignore[call-overload]
                return None
        elif _are_same(now, self.present):
            return None
        known = set(self.present)
        now = [k for k in now if k in known or not self._is_set(k)]
        if self.names is None:
            return None if _are_same(now, self.present) else self.holder.label
        new = (k for k in now if k not in known and k in self.names)
        return next(map(self.holder.name_of, new), None)


def _are_same(a: Collection[Hashable], b: Sequence[Hashable]) -> bool:
    """Whether these are the same names, in the same order."""
    if len(a) != len(b):
        return False
    return all(map(operator.is_, a, b)) or all(
        x is y or (type(x) is type(y) and value_key(x) == value_key(y))
        for x, y in zip(a, b, strict=True)
    )


def _same_items(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


class Reads:
    """The Python values that a forward read.

    Args:
        watched: such values.
        arguments: what it asked of its arguments.
        modes: of the call, as far as the forward read them.
    """

    def __init__(
        self,
        watched: Sequence[Read],
        arguments: ArgumentReads,
        modes: CallModes | None = None,
    ) -> None:
        self._modes = modes
        self._arguments = arguments
        self._call = arguments.key(())
        self._watched = list(map(_Watched.of, watched))

    @property
    def names(self) -> frozenset[str] | None:
        """All names by which the forward can have read attributes; None: unknown."""
        return self._arguments.names

    @property
    def not_compared(self) -> list[str]:
        """Names of what the forward read, but is too large to be compared in every call."""
        found = [(w.holder, w.values.get(CONTENT)) for w in self._watched]
        return [
            holder.label
            for holder, value in found
            if value is TooLarge or (isinstance(value, tuple) and value[:1] == (TooLarge,))
        ]

    @property
    def asked(self) -> ArgumentReads:
        """What the forward asked of its arguments."""
        return self._arguments

    def of_call(self, leaves: Sequence[Any], names: Sequence[str], source: str | None) -> None:
        """Set the call that the model was captured for.

        Args:
            leaves: its flattened arguments.
            names: of the tensors among the leaves, for messages.
            source: where the forward is, for messages.

        Raises:
            CaptureError: the forward can tell an argument from the one that it was traced with.
        """
        self._arguments.check(leaves, names, source)
        for w in self._watched:  # what a function told within a with statement, or of the trace
            if isinstance(w.holder, (Answers, ForeignFunctions)):
                for asked in [k for k, v in w.values.items() if w.holder.get(k) != v]:
                    del w.values[asked]
        self._call = self._arguments.key(leaves)

    def changed(self, leaves: Sequence[Any]) -> str | None:
        """Return the name of a value that differs from the one that was read; None: none does.

        A list, dict, set or array is compared by its contents, an object by the attributes that
        the forward read.

        Args:
            leaves: the flattened arguments of the call that asks.
        """
        if self._arguments.key(leaves) != self._call:
            return "an argument"
        if self._modes is not None and (mode := self._modes.changed()) is not None:
            return f"torch.{mode}()"
        return next((name for w in self._watched if (name := w.changed()) is not None), None)

    def __str__(self) -> str:
        return ", ".join(w.holder.name_of(k) for w in self._watched for k in w.values)


def is_compared_elsewhere(value: Any) -> bool:
    """Whether another check compares this attribute of a module (`autopipe.model_state_key`)."""
    return value is Missing or type(value) in (int, float, bool, str, type(None))
