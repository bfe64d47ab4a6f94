"""By what the gradients that arrive at a step's outputs are larger than those that it began with.

A step whose schedule starts backwards early begins with the gradients of the model's loss. What
arrives when the caller's backward reaches it is those times a factor: a loss scale, or 1/n. Finding
it out makes the host wait for the device. So a loss on a device with streams is compared on the
host until its factor is known; then its gradients are multiplied by the ratio on the device, and
the ratio is read when it has come to the host by itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from autopipe.passes._torch_foreach import multiply_all_
from autopipe.runtime.backends import backend_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from autopipe.runtime.backends import Event

AGREE = 1e-5
"""The largest relative difference between factors that are the same but for rounding."""


class LossFactor:
    """The factor of a model's loss, from step to step.

    Attributes:
        value: by what the last gradient of the loss was larger than 1: the next step begins with
            it, so that gradients of half precision do not vanish.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._is_known = False
        self._late: tuple[Tensor, Event] | None = None

    def for_next_step(self) -> float:
        """The value, changed by a ratio that has come to the host meanwhile."""
        if self._late is not None and self._late[1].query():
            ratio, self._late = self._late[0].item(), None
            if ratio != 1:
                self.settle(ratio)
        return self.value

    def settle(self, factor: float, *, always_one: bool = False) -> None:
        """Take over a factor that was found on the host.

        Args:
            factor: by what gradients are larger than those that the step began with.
            always_one: steps begin with 1, whatever the factor.
        """
        is_usable = math.isfinite(factor) and factor != 0
        if is_usable and not always_one:
            self.value *= factor
        self._is_known = is_usable and (always_one or factor == 1)

    def ratio(
        self, given: Sequence[Tensor | None], arrived: Sequence[Tensor | None]
    ) -> Tensor | None:
        """The factor as a tensor, for which the host does not wait.

        Args:
            given: gradients of the outputs with which the step began; None if an output has none.
            arrived: those that the caller's backward brings.

        Returns:
            A scalar on the device of the gradients; None: the host has to compare them.
        """
        both = zip(given, arrived, strict=True)
        pairs = [pair for pair in both if any(g is not None for g in pair)]
        if not self._is_known or len(pairs) != 1:
            return None
        one, other = pairs[0]
        if one is None or other is None or one.numel() != 1 or one.device != other.device:
            return None
        stream = backend_of(other.device).current_stream(other.device)
        if stream is None:  # the host has the numbers
            return None
        wide = torch.promote_types(other.dtype, torch.float32)  # 65536 is too much for float16
        one, other = one.reshape(()).to(wide), other.reshape(()).to(wide)
        ratio = (other / one).masked_fill(other == one, 1)  # both are 0: the loss has the weight 0
        if self._late is None:
            self._late = ratio.to("cpu", non_blocking=True), stream.record_event()
        return ratio


def multiplied(
    inputs: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    factor: float | Tensor,
    *,
    in_place: bool,
) -> tuple[Tensor | None, ...]:
    """Multiply gradients by a factor.

    Args:
        inputs: of inputs.
        parameters: of parameters.
        factor: a number, or a scalar on some device.
        in_place: whether nobody else has those of parameters.

    Returns:
        All of them, those of inputs first.
    """
    own = [g if g is None or in_place else g.clone() for g in parameters]
    found = (*(None if g is None else g.clone() for g in inputs), *own)
    multiply_all_([g for g in found if g is not None], factor)
    return found


def common_factor(given: Sequence[Tensor | None], arrived: Sequence[Tensor | None]) -> float | None:
    """By what factor some gradients are larger than others; None: there is no such factor.

    The host waits for them.

    Args:
        given: gradients of the outputs; None if an output has none.
        arrived: likewise; what is asked about.
    """
    factors: list[float] = []
    for one, other in zip(given, arrived, strict=True):
        if one is None or other is None:
            rest = other if one is None else one
            if rest is not None and rest.any():
                return None
        elif torch.equal(one, other):
            factors += [1.0] if one.any() else []
        else:
            if not other.isfinite().all():  # a scale that overflows; an optimizer skips the step
                return math.nan
            before, after = one.double(), other.double()
            where = before != 0
            if after[~where].any() or not where.any():
                return None
            ratios = after[where] / before[where]
            factors += [ratios.min().item(), ratios.max().item()]
    least, most = min(factors, default=1.0), max(factors, default=1.0)
    if least == most:
        return least
    return least if abs(most - least) <= AGREE * max(abs(most), abs(least)) else None
