"""Losses and other reductions over the batch, as rules of random models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.random_kinds import Kind, Made, batch_first, broadcast, plain, rule


@rule
def mean(n: int, x: Kind) -> Made | None:
    if not plain(x) or x.batch is None or not x.numel:
        return None
    return Made(torch.mean, (Kind(batch=None, reduced=True),), saves="")


@rule
def op_sum(n: int, x: Kind) -> Made | None:
    if not plain(x) or x.batch is None:
        return None
    return Made(lambda t: t.sum() / 4, (Kind(batch=None, reduced=True),), saves="")


@rule
def over_batch(n: int, x: Kind) -> Made | None:
    """The mean or the sum over samples of every feature."""
    if not plain(x) or x.batch is None:
        return None
    dim = x.batch
    kind = replace(x, batch=None, rows=1, reduced=True)
    return Made(lambda t: t.mean(dim) if n % 2 else t.sum(dim), (kind,), saves="")


@rule
def mse(n: int, a: Kind, b: Kind) -> Made | None:
    if a != b or not plain(a) or a.batch is None or not a.numel:
        return None
    function = (F.mse_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits)[n % 3]
    run = lambda s, t: function(s, t, reduction="sum" if n > 8 else "mean")  # noqa: E731
    return Made(run, (Kind(batch=None, reduced=True),))


@rule
def masked_mean(n: int, x: Kind, mask: Kind) -> Made | None:
    """A ratio of two sums over the batch."""
    if not plain(x) or replace(x, dtype="bool") != mask or x.batch is None:
        return None
    run = lambda t, m: (t * m).sum() / m.sum().clamp(min=1)  # noqa: E731
    return Made(run, (Kind(batch=None, reduced=True),))


def _logits(x: Kind, i: Kind) -> tuple[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Number of classes, 0 if the two do not fit; and how to bring them in form."""
    if plain(x) and plain(i, dtype="long") and batch_first(x, i) and x.shape and x.numel:
        if x.shape[1:] == i.shape:
            return x.shape[0], lambda t, j: (t, j % x.shape[0])
        if x.shape[:-1] == i.shape:  # as language models do
            classes = x.shape[-1]
            return classes, lambda t, j: (t.reshape(-1, classes), j.reshape(-1) % classes)
    return 0, lambda t, j: (t, j)


@rule
def cross_entropy(n: int, x: Kind, i: Kind) -> Made | None:
    """Its mean is over what is not ignored, and one class is ignored now and then."""
    classes, formed = _logits(x, i)
    if classes < 2:
        return None

    def run(t: Tensor, j: Tensor) -> Tensor:
        return F.cross_entropy(
            *formed(t, j),
            ignore_index=n % classes if n % 2 else -100,
            reduction="sum" if n in (2, 3) else "mean",
            label_smoothing=0.1 if n in (4, 5) else 0.0,
        )

    return Made(run, (Kind(batch=None, reduced=True),))


@rule
def weighted_cross_entropy(n: int, x: Kind, i: Kind, w: Kind) -> Made | None:
    """The same with a weight for each class: an unbatched value or a buffer."""
    classes, formed = _logits(x, i)
    if classes < 2 or not plain(w) or w.batch is not None or w.shape != (classes,):
        return None
    ignored = n % classes if n % 2 else -100

    def run(t: Tensor, j: Tensor, v: Tensor) -> Tensor:
        return F.cross_entropy(*formed(t, j), v.detach().square() + 0.5, ignore_index=ignored)

    return Made(run, (Kind(batch=None, reduced=True),))


@rule
def hits(n: int, mask: Kind) -> Made | None:
    """A number of samples, as integers."""
    if not plain(mask, dtype="bool") or mask.batch is None:
        return None
    return Made(torch.sum, (Kind(dtype="long", batch=None, high=1, reduced=True),), saves="")


@rule
def weigh(n: int, loss: Kind) -> Made | None:
    if not loss.reduced or loss.dtype != "float":
        return None
    run = (lambda t: t * 0.3, lambda t: torch.log1p(t * t), lambda t: t.detach() + 1)[n % 3]
    return Made(run, (loss,))


@rule
def add_losses(n: int, a: Kind, b: Kind) -> Made | None:
    """Two losses, or a loss and a number that does not depend on the batch."""
    kind = broadcast(a, b)
    if not a.reduced or a.dtype != "float" or b.dtype != "float" or b.batch is not None:
        return None
    run = (lambda s, t: s + 0.2 * t) if n % 2 else (lambda s, t: s / (1 + t * t))
    return Made(run, (kind,)) if kind else None
