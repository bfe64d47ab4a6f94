"""The loss of connectionist temporal classification (CTC) as ops that torch.export can capture.

torch's own op saves a table (the forward variables α of Graves et al. 2006, section 4.1) whose size
depends on the length of the longest target, a tensor value, so torch.export refuses it. Here the
table is sized for targets that fill their padded row: 2 S + 1 entries. The kernels are torch's.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autopipe.passes.one_at_a_time import replaced

if TYPE_CHECKING:
    from collections.abc import Iterator

aten = torch.ops.aten
ORIGINAL_CTC_LOSS: Any = torch.ctc_loss
MEAN, SUM = 1, 2  # ATen's numbers for `reduction`


@torch.library.custom_op("autopipe::ctc_loss", mutates_args=())
def sample_losses(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of every sample, and the table for its gradient.

    Args:
        log_probs: (T, N, C).
        targets: (N, S), padded.
        input_lengths: (N,).
        target_lengths: (N,).
        blank: the class that stands for no label.
        zero_infinity: whether the backward kernel zeroes the gradients of infinite losses.

    Returns:
        The losses (N,) and the table (N, T, 2 S + 1).
    """
    loss, table = aten._ctc_loss.Tensor(
        log_probs, targets, input_lengths, target_lengths, blank, zero_infinity
    )
    return loss, F.pad(table, (0, 2 * targets.shape[1] + 1 - table.shape[2]))


@sample_losses.register_fake
def _sample_losses_meta(
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
def log_prob_gradients(
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
    """Compute the gradient of the log probabilities.

    Args:
        gradient: of the losses, (N,).
        log_probs, targets, input_lengths, target_lengths, blank, zero_infinity: see
            `sample_losses`.
        loss, table: results of `sample_losses`.

    Returns:
        (T, N, C), contiguous.
    """
    longest = 2 * int(target_lengths.max()) + 1
    lengths = input_lengths, target_lengths
    found: Tensor = aten._ctc_loss_backward.Tensor(
        *(gradient.contiguous(), log_probs, targets, *lengths),
        *(loss, table[..., :longest].contiguous(), blank, zero_infinity),
    )
    return found


@log_prob_gradients.register_fake
def _log_prob_gradients_meta(gradient: Tensor, log_probs: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return log_prob_gradients(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 5


sample_losses.register_autograd(_backward, setup_context=_save)

CTC_LOSS_OP = torch.ops.autopipe.ctc_loss
"""The op that captured graphs hold for `sample_losses`."""


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = MEAN,
    zero_infinity: bool = False,
) -> Tensor:
    """Replace ``torch.ctc_loss``: same arguments, same result.

    Args:
        log_probs: (T, N, C); for another rank the original is called, which cannot be captured.
        targets: (N, S), padded; for another rank the original is called.
        input_lengths, target_lengths: (N,), tensors or sequences of integers.
        blank: the class that stands for no label.
        reduction: 0 none, 1 mean, 2 sum.
        zero_infinity: whether infinite losses count as 0.

    Returns:
        (N,) without a reduction, else ().
    """
    if log_probs.dim() != 3 or targets.dim() != 2:
        rest = input_lengths, target_lengths, blank, reduction, zero_infinity
        original: Tensor = ORIGINAL_CTC_LOSS(log_probs, targets, *rest)
        return original
    lengths = (
        torch.as_tensor(n, dtype=torch.long, device=log_probs.device)
        for n in (input_lengths, target_lengths)
    )
    inputs, labels = lengths
    loss: Tensor = sample_losses(log_probs, targets, inputs, labels, blank, zero_infinity)[0]
    if zero_infinity:
        loss = torch.where(loss == torch.inf, 0.0, loss)
    if reduction == MEAN:
        return (loss / labels.clamp_min(1).to(loss.dtype)).mean()
    return loss.sum() if reduction == SUM else loss


@contextmanager
def exportable_ctc_loss() -> Iterator[None]:
    """Replace ``torch.ctc_loss`` by `ctc_loss` until exit."""
    with replaced(torch, "ctc_loss", ctc_loss):
        yield
