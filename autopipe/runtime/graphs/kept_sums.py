"""`KeptSums`: sums of a stage's gradients in memory that stays where it is."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch
    from torch import Tensor

    from autopipe.runtime.executor import Run

    from .observed import TensorLayout


class KeptSums:
    """What captured phases add gradients to. One run at a time uses them.

    Args:
        stage: the stage.
        device: its device.
        parameters: the names of its parameters, in the order of the stage's code.
    """

    def __init__(self, stage: int, device: torch.device, parameters: Sequence[str]) -> None:
        self._stage, self._device, self._parameters = stage, device, parameters
        self._sums: dict[int, Tensor] = {}
        self._used: set[int] = set()
        self._user: weakref.ref[Run] | None = None

    def of(self, layouts: Mapping[int, TensorLayout]) -> dict[int, Tensor]:
        """The sums for some parameters, which are made if there are none.

        Args:
            layouts: of the gradients, by the parameters' positions.
        """
        for i, layout in layouts.items():
            if i not in self._sums:
                self._sums[i] = layout.dense().new(self._device)
        return {i: self._sums[i] for i in layouts}

    def claim(self, run: Run, positions: Collection[int]) -> bool:
        """Let a run use sums; they are zero when it does so first.

        Args:
            run: whose gradients are to be summed.
            positions: of the parameters.

        Returns:
            Whether it may: not while another run uses them, nor if it has begun other sums.
        """
        user = None if self._user is None else self._user()
        if user is not run:
            if user is not None:
                return False
            self._user, self._used = weakref.ref(run), set()
        new = [i for i in positions if i not in self._used]
        if any(run.gradients.has(self._parameters[i], self._stage) for i in new):
            return False
        for i in new:
            self._sums[i].zero_()
            run.gradients.put(self._parameters[i], self._stage, self._sums[i])
            self._used.add(i)
        return True

    def hand_over(self, run: Run) -> None:
        """Give a run, which has added all its gradients, copies of the sums: it keeps them.

        Args:
            run: may have used none.
        """
        if self._user is None or self._user() is not run:
            return
        for i in self._used:
            run.gradients.put(self._parameters[i], self._stage, self._sums[i].clone())
        self._user, self._used = None, set()
