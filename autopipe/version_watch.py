"""Notice tensors that are changed in place between a forward and its backward.

Autograd does the same for the tensors that it saves (torch.autograd.graph, "In-place correctness
checks"): it compares their version counters. As there, a change of ``.data`` goes unnoticed, and a
tensor that the backward does not read may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from torch import Tensor


class VersionWatch:
    """The versions of some tensors at the time when they were added."""

    def __init__(self) -> None:
        self._watched: list[tuple[Sequence[str], Sequence[Tensor], Sequence[int]]] = []

    def add(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Watch tensors from now on.

        Args:
            names: what errors call them.
            tensors: one per name; a view or an alias shares the version of its base.
        """
        self._watched.append((names, tensors, _versions(tensors)))

    def changed(self, names: Container[str] | None = None) -> str | None:
        """Return the name of a tensor that was changed in place, or None.

        Args:
            names: those to look at; None: all.
        """
        for labels, tensors, versions in self._watched:
            now = _versions(tensors)
            if now == versions:
                continue
            for name, before, after in zip(labels, versions, now, strict=True):
                if before != after and (names is None or name in names):
                    return name
        return None

    def clear(self) -> None:
        """Watch nothing any more."""
        self._watched.clear()


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # nothing may change an inference tensor in place: it has no version
        return [0 if t.is_inference() else t._version for t in tensors]
