"""Test numerically whether a custom autograd.Function's backward keeps samples independent.

The gradients for all samples must equal those for slices of them: concatenated for a tensor that
holds samples, added up for one that does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from autopipe.passes.graph import is_close

from .lattice import Samples
from .slicing import join_parts, slice_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .lattice import State


class TrialRun:
    """One application of a Function with gradients enabled.

    Args:
        call: the op that calls the Function.
        tensors: its tensor arguments.

    Attributes:
        results: the tensors that the forward returned.
    """

    def __init__(self, call: fx.Node, tensors: Sequence[Tensor]) -> None:
        self.leaves = [x.detach() for x in tensors]
        for x in self.leaves:
            x.requires_grad_(x.is_floating_point() or x.is_complex())
        target, (_, *rest) = call.target, call.args
        with torch.enable_grad():
            self.results: list[Tensor] = target(self.leaves, *rest)  # type: ignore[operator]

    def gradients(self, result: int, tangent: Tensor) -> list[Tensor | None]:
        """The tensors' gradients for a tangent of one result; None where there is none."""
        root, wanted = self.results[result], [x for x in self.leaves if x.requires_grad]
        if not root.requires_grad or not wanted:
            return [None] * len(self.leaves)
        with torch.enable_grad():
            found = iter(
                torch.autograd.grad(root, wanted, tangent, retain_graph=True, allow_unused=True)
            )
        return [next(found) if x.requires_grad else None for x in self.leaves]


def backward_keeps_apart(
    whole: TrialRun,
    parts: Sequence[TrialRun],
    result: int,
    found: Samples,
    states: Sequence[State],
    cuts: Sequence[tuple[int, int]],
) -> bool:
    """Compare the gradients of one result for all samples with those for slices of them.

    Args:
        whole: the Function's run on all samples.
        parts: the Function's run on each slice.
        result: position of the result.
        found: the state of that result.
        states: of the Function's tensor arguments.
        cuts: (first sample, number of samples) of each slice.
    """
    value = whole.results[result]
    generator = torch.Generator(value.device).manual_seed(0)
    tangent = torch.randn(value.shape, dtype=value.dtype, device=value.device, generator=generator)
    shares = [slice_samples(tangent, found, *c) for c in cuts]
    compared = zip(
        states,
        whole.gradients(result, tangent),
        *(p.gradients(result, s) for p, s in zip(parts, shares, strict=True)),
        strict=True,
    )
    for state, expected, *pieces in compared:
        here = [p for p in pieces if p is not None]
        if expected is None or len(here) < len(parts):
            if expected is not None or here:
                return False
            continue
        joint = join_parts(here, state) if isinstance(state, Samples) else torch.stack(here).sum(0)
        if not is_close(joint, expected):
            return False
    return True
