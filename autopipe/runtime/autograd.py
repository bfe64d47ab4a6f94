"""The pipeline as one node of the caller's autograd graph.

Parameters are inputs of that node, so that autograd itself accumulates into `.grad`, runs hooks and
skips frozen parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class AutogradStep(Protocol):
    """What the autograd node needs of a pipeline call."""

    def forward(self) -> tuple[Tensor, ...]:
        """Run all micro-batches forward and return the outputs of the whole batch."""

    def differentiable(self) -> Sequence[bool]:
        """For each output, whether a gradient can flow back from it."""

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors passed to `apply`, from those of the outputs.

        Autograd calls it with gradients enabled for ``create_graph=True``: what it returns then can
        be differentiated again.
        """


class PipelineFunction(torch.autograd.Function):
    """`PipelineFunction.apply(step, *tensors)`; `tensors` are those that need gradients."""

    @staticmethod
    def forward(ctx: Any, step: AutogradStep, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.set_materialize_grads(False)
        # Two outputs may be one tensor object, as x and x.detach() are, and be marked differently.
        outputs = tuple(o.detach() for o in step.forward())
        fixed = [o for o, d in zip(outputs, step.differentiable(), strict=True) if not d]
        ctx.mark_non_differentiable(*fixed)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.step.backward(gradients))
