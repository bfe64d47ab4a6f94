"""Notice tensors that are changed in place between a forward and its backward.

Autograd does the same for the tensors that it saves (torch.autograd.graph, "In-place correctness
checks"): it compares their version counters. As there, a change of ``.data`` goes unnoticed, and a
tensor that the backward does not read may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from torch import Tensor


class _Entry(NamedTuple):
    name: str
    tensor: Tensor
    version: int


class VersionWatch:
    """The versions of some tensors at the time when they were added."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def add(self, names: Iterable[str], tensors: Iterable[Tensor]) -> None:
        """Watch tensors from now on.

        Args:
            names: what errors call them.
            tensors: one per name; a view or an alias shares the version of its base.
        """
        self._entries += [_Entry(n, t, _version(t)) for n, t in zip(names, tensors, strict=True)]

    def changed(self, names: Container[str] | None = None) -> str | None:
        """Return the name of a tensor that was changed in place, or None.

        Args:
            names: those to look at; None: all.
        """
        return next(
            (
                name
                for name, tensor, version in self._entries
                if _version(tensor) != version and (names is None or name in names)
            ),
            None,
        )

    def clear(self) -> None:
        """Watch nothing any more."""
        self._entries.clear()


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor: nothing may change it in place
        return 0
