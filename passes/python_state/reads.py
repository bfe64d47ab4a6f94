"""`Reads`: the Python values that a forward read, to notice when they change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .holders import CONTENT, Dict, Missing, TooLarge
from .noted import Answers
from .value_keys import value_key

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from .ambient import CallModes
    from .arguments import ArgumentReads
    from .holders import Holder


@dataclass(frozen=True, eq=False)
class _Watched:
    """Some values of one holder, as they were when the model was captured."""

    holder: Holder
    values: dict[Hashable, Any]
    keys: Mapping[Hashable, Hashable]
    """For each value its `value_key`: what a mutable one contained."""

    def changed(self) -> str | None:
        holder = self.holder
        whole = isinstance(holder, Dict) and CONTENT not in self.values
        if whole and len(holder.owner) != len(self.values):
            return holder.label
        for key, value in self.values.items():
            found = holder.get(key)
            if found is value:
                continue
            if isinstance(value, tuple) and isinstance(found, tuple) and _same_items(value, found):
                continue
            if value_key(found) != self.keys[key]:
                return holder.name_of(key)
        return None


def _same_items(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


class Reads:
    """The Python values that a forward read.

    Args:
        watched: for each holder of such values, the values.
        arguments: what it asked of its arguments.
        modes: of the call, as far as the forward read them.
    """

    def __init__(
        self,
        watched: Sequence[tuple[Holder, dict[Hashable, Any]]],
        arguments: ArgumentReads,
        modes: CallModes | None = None,
    ) -> None:
        self._modes = modes
        self._arguments = arguments
        self._call = arguments.key(())
        self._watched = [
            _Watched(holder, values, {k: value_key(v) for k, v in values.items()})
            for holder, values in watched
        ]

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

    def of_call(self, leaves: Sequence[Any], names: Sequence[str]) -> None:
        """Set the call that the model was captured for.

        Args:
            leaves: its flattened arguments.
            names: of the tensors among the leaves, for messages.

        Raises:
            CaptureError: the forward can tell an argument from the one that it was traced with.
        """
        self._arguments.check(leaves, names)
        for w in self._watched:  # what a function told within a with statement, or of the trace
            if isinstance(w.holder, Answers):
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
