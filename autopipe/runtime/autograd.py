"""The pipeline as one node of the caller's autograd graph.

Parameters are inputs of that node, so autograd itself accumulates into `.grad`, runs hooks and
skips frozen parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class AutogradStep(Protocol):
    """One training step of a pipeline, as the autograd node sees it."""

    def forward(self) -> tuple[Tensor, ...]:
        """Run the micro-batches forward; the combined outputs."""

    def differentiable(self) -> Sequence[bool]:
        """For each output, whether gradients can flow back from it."""

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Run the micro-batches backward; the gradients of the tensors passed to `apply`."""


class PipelineFunction(torch.autograd.Function):
    """`PipelineFunction.apply(step, *tensors)`: `tensors` are those that need gradients."""

    @staticmethod
    def forward(ctx: Any, step: AutogradStep, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.set_materialize_grads(False)
        # Two outputs may be the same tensor object (x and x.detach()); detaching each gives every
        # output an object of its own, which can be marked.
        outputs = tuple(o.detach() for o in step.forward())
        fixed = [o for o, d in zip(outputs, step.differentiable(), strict=True) if not d]
        ctx.mark_non_differentiable(*fixed)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.step.backward(gradients))
