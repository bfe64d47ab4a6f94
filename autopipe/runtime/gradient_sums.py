"""`GradientSums`: the gradients of parameters that a run adds up over its micro-batches.

Each stage has a sum of its own for each parameter whose gradient it computes. So the workers of two
stages never write to the same entry, also where both have a part of a shared parameter's gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor


class GradientSums:
    """Sums of gradients, by parameter and stage."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._own: set[tuple[str, int]] = set()  # the sums that nothing else refers to

    def add(self, parameter: str, stage: int, gradient: Tensor) -> None:
        """Add a micro-batch's gradient; called in the order of micro-batches.

        Args:
            parameter: its name.
            stage: the stage that computed the gradient.
            gradient: of the parameter, or of the stage's copy of it.
        """
        key = parameter, stage
        total = self._sums.get(key)
        if total is None:
            self._sums[key] = gradient
        elif key in self._own:
            total.add_(gradient)
        else:  # the first gradient may have other owners: add out of place, once
            self._sums[key] = total + gradient
            self._own.add(key)

    def has(self, parameter: str, stage: int) -> bool:
        """Whether there is a sum.

        Args:
            parameter, stage: as for `add`.
        """
        return (parameter, stage) in self._sums

    def put(self, parameter: str, stage: int, total: Tensor) -> None:
        """Set a sum.

        Args:
            parameter, stage: as for `add`.
            total: nobody else uses it for as long as gradients are added.
        """
        key = parameter, stage
        self._sums[key] = total
        self._own.add(key)

    def totals(self, devices: Mapping[str, torch.device]) -> list[Tensor | None]:
        """Return the gradients of parameters, when all micro-batches have been added.

        Where several stages have a part, the parts are added in the order of stages. Only the total
        is kept, so that no part occupies memory.

        Args:
            devices: parameter → the device that its gradient must be on.

        Returns:
            One per parameter in `devices`; None if it has no gradient.
        """
        parts: dict[str, list[int]] = {}
        for parameter, stage in sorted(self._sums):
            parts.setdefault(parameter, []).append(stage)
        return [
            self._total(parameter, parts[parameter], device) if parameter in parts else None
            for parameter, device in devices.items()
        ]

    def _total(self, parameter: str, stages: list[int], device: torch.device) -> Tensor:
        first = parameter, stages[0]
        total = self._sums[first]
        if total.device != device:
            total = self._sums[first] = total.to(device)
            self._own.add(first)
        for stage in stages[1:]:
            part = self._sums.pop((parameter, stage)).to(device)
            if total.is_sparse and not part.is_sparse:  # the only order that torch has
                total = part + total
            elif first in self._own:
                total.add_(part)
            else:
                total = total + part
            self._sums[first] = total
            self._own.add(first)
        return total

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._sums.values())

    def clear(self) -> None:
        """Free all sums."""
        self._sums.clear()
        self._own.clear()
