"""`Change`: a Python value that a forward changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from autopipe.errors import CaptureError

from .holders import Missing
from .value_keys import PLAIN

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from .holders import Holder


class Change(NamedTuple):
    """A value that a forward changed.

    Attributes:
        holder: what holds it.
        key: its name or key there.
        before: its value before the forward; `Missing` if there was none.
        after: its value after the forward; `Missing` if there is none.
    """

    holder: Holder
    key: Hashable
    before: Any
    after: Any

    def set(self, which: str) -> None:
        """Set it to its value "before" or "after" the forward."""
        self.holder.write(self.key, getattr(self, which))

    def __str__(self) -> str:
        return self.holder.name_of(self.key)


def set_changes(changed: Sequence[Change], which: str) -> None:
    """Set values to what they were "before" or "after" the forward."""
    for change in changed if which == "after" else reversed(changed):
        change.set(which)


class Forgotten:
    """Stands for a value that may hold tensors of a trace."""


def forget_tensors(change: Change) -> Change:
    """Drop the new value of a change unless it is plain data."""
    plain = isinstance(change.after, (*PLAIN, float, complex)) or change.after is Missing
    return change if plain else change._replace(after=Forgotten)


def refuse_replaced_modules(changed: Iterable[Change]) -> None:
    """Refuse a forward that replaces parameters or layers of the model.

    Args:
        changed: what the forward changed.

    Raises:
        CaptureError: it replaced one, created one or removed one.
    """
    for change in changed:
        if change.holder.kind in ("parameter", "module"):
            raise CaptureError(
                f"the forward replaces a {change.holder.kind} of the model: a captured model would"
                " go on with the old one",
                found=str(change),
                remedy="create it in __init__, and write into it under torch.no_grad():"
                " parameter.copy_(value); if only the first call creates it, call the model itself"
                " once before the pipeline",
            )
