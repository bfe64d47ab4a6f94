"""What a forward changed and read of the Python values that it can reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments import ArgumentReads
from .changes import Change
from .holder_of import Array
from .holders import (
    ClassAttributes,
    Dict,
    Globals,
    Missing,
    ModuleAttributes,
    Namespace,
    Sequence,
    Slots,
)
from .iterators import iterator_error, iterator_state
from .kinds import is_imported_part
from .members import SPECIAL
from .random_numbers import random_error, restore_generator, saved_generator
from .reachable import ReachableState
from .reads import Read, Reads, is_compared_elsewhere
from .value_keys import is_same

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from .ambient import CallModes
    from .holders import Holder


class PythonState(ReachableState):
    """The Python values that a model's code can reach, before and after its forward.

    Args:
        model: the model, before its forward.
    """

    def changes(self) -> list[Change]:
        """What differs from when it was first seen."""
        found = []
        for holder, before in self.values.values():
            if not holder.is_changed:
                continue
            after = holder.read()
            for key in {**before, **after}:
                old, new = before.get(key, Missing), after.get(key, Missing)
                if old is Missing and is_imported_part(holder.label, key, new):
                    before[key] = new  # as if it had been there before
                elif old is not new and not is_same(old, new):
                    found.append(Change(holder, key, old, new))
        return found

    def place_of(self, value: Any) -> str | None:
        """Where a value was found, for messages."""
        for holder, values in self.values.values():
            for key, found in values.items():
                if found is value:
                    return holder.name_of(key)
                if isinstance(found, tuple) and any(x is value for x in found):
                    return holder.label
        return None

    def reads(self, changed: Iterable[Change], modes: CallModes | None = None) -> Reads:
        """What the called code can have read, to be compared later.

        Args:
            changed: what the forward itself changes; it is not compared.
            modes: of the call, as far as the forward read them.
        """
        sets: dict[int, dict[Hashable, Any]] = {}  # what it sets
        own = set()
        for c in changed:
            sets.setdefault(id(c.holder), {})[c.key] = c.after
            if c.before is not None and c.before is not Missing:
                own.add((id(c.holder), c.key))  # else others may set it, to something else
        known = self.is_watched and not self.reads_unnamed
        every = frozenset(self.names)
        watched = [Read(*found) for found in self.noted.holders()]
        for holder, values in self.values.values():
            if holder.kind != "attribute":  # compared by the key of the model's state
                continue
            is_container = isinstance(holder, (Dict, Sequence, Array))
            if known and is_container and id(holder.owner) not in self.followed:
                continue
            names = self._names_of(holder, every)
            elsewhere = isinstance(holder, ModuleAttributes)
            read = {
                key: value
                for key, value in values.items()
                if (names is None or key in names)
                and (id(holder), key) not in own
                and not (elsewhere and is_compared_elsewhere(value))
            }
            if read or not elsewhere:
                watched.append(Read(holder, read, names, sets.get(id(holder), {})))
        names = every if known else None
        asked = dict.fromkeys(self.noted.arguments, True)
        if not self.is_watched:
            asked["identity"] = True
        return Reads(watched, ArgumentReads(**asked, names=names), modes)

    def _names_of(self, holder: Holder, every: frozenset[str]) -> frozenset[str] | None:
        """The names by which the called code can have asked a holder; None: by any."""
        if isinstance(holder, Globals) or not isinstance(holder, (Namespace, Slots)):
            return None
        if id(holder.owner) in self.whole:
            return None
        return every | SPECIAL if isinstance(holder, ClassAttributes) else every

    def check_generators(self) -> None:
        """Check that no generator of random numbers that is not torch's, and no iterator, was used.

        Raises:
            CaptureError: one was used.
        """
        for label, (generator, state) in self.generators.items():
            if repr(saved_generator(generator)) != repr(state):
                restore_generator(generator, state)
                raise random_error(label, None)
        for label, (iterator, before) in self.iterators.items():
            if iterator_state(iterator) != before:
                raise iterator_error(label)

    def clear_caches(self) -> None:
        """Empty the function caches that have grown: what they hold may belong to the trace."""
        for cache, size in self.caches.values():
            if cache.cache_info().currsize != size:
                cache.cache_clear()
