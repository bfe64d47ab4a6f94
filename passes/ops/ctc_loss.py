"""Connectionist temporal classification, in a form that torch.export can capture.

torch's own operator saves a table (forward variables, α of Graves et al. 2006, section 4.1) whose
size depends on the longest target, a value; so the exporter refuses it. Here the table has room for
targets as long as their padded row, 2 S + 1 entries, and the kernels are torch's.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

aten = torch.ops.aten
ORIGINAL: Any = torch.ctc_loss
MEAN, SUM = 1, 2  # ATen's numbers for `reduction`


@torch.library.custom_op("autopipe::ctc_loss", mutates_args=())
def losses(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of every sample (N,), and the table for its gradient (N, T, 2 S + 1).

    Args:
        log_probs: (T, N, C).
        targets: (N, S), padded.
        input_lengths: (N,).
        target_lengths: (N,).
        blank: the class that stands for no label.
        zero_infinity: what is given to the backward kernel.
    """
    loss, table = aten._ctc_loss.Tensor(
        log_probs, targets, input_lengths, target_lengths, blank, zero_infinity
    )
    return loss, F.pad(table, (0, 2 * targets.shape[1] + 1 - table.shape[2]))


@losses.register_fake
def _losses_look(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    steps, samples, _ = log_probs.shape
    for other in (targets, input_lengths, rest[0]):
        if other.shape[0] != samples:
            raise ValueError(f"{samples} samples, but {other.shape[0]} targets or lengths")
    return log_probs.new_empty(samples), log_probs.new_empty(
        samples, steps, 2 * targets.shape[1] + 1
    )


@torch.library.custom_op("autopipe::ctc_loss_backward", mutates_args=())
def gradients(
    gradient: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    loss: Tensor,
    table: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """The gradient of the log probabilities; arguments and results of `losses`."""
    longest = 2 * int(target_lengths.max()) + 1
    lengths = input_lengths, target_lengths
    found: Tensor = aten._ctc_loss_backward.Tensor(
        *(gradient.contiguous(), log_probs, targets, *lengths),
        *(loss, table[..., :longest].contiguous(), blank, zero_infinity),
    )
    return found


@gradients.register_fake
def _gradients_look(gradient: Tensor, log_probs: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return gradients(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 5


losses.register_autograd(_backward, setup_context=_keep)
PACKET = torch.ops.autopipe.ctc_loss


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = MEAN,
    zero_infinity: bool = False,
) -> Tensor:
    """``torch.ctc_loss`` of padded targets; of others, the original, which is not captured."""
    if log_probs.dim() != 3 or targets.dim() != 2:
        given = input_lengths, target_lengths, blank, reduction, zero_infinity
        original: Tensor = ORIGINAL(log_probs, targets, *given)
        return original
    lengths = (
        torch.as_tensor(n, dtype=torch.long, device=log_probs.device)
        for n in (input_lengths, target_lengths)
    )
    inputs, labels = lengths
    loss: Tensor = losses(log_probs, targets, inputs, labels, blank, zero_infinity)[0]
    if zero_infinity:
        loss = torch.where(loss == torch.inf, 0.0, loss)
    if reduction == MEAN:
        return (loss / labels.clamp_min(1).to(loss.dtype)).mean()
    return loss.sum() if reduction == SUM else loss


@contextmanager
def ctc_losses() -> Iterator[None]:
    """While a model is traced, `ctc_loss` stands for torch's."""
    with mock.patch.object(torch, "ctc_loss", ctc_loss):
        yield
