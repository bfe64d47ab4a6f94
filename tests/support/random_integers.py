"""Integers, masks, what they choose, and complex numbers, as rules of random models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from tests.support.random_kinds import (
    Kind,
    Made,
    batch_first,
    broadcast,
    featured,
    plain,
    ramp,
    rule,
)

# ------------------------------------------------------------------------------ integers and masks


@rule
def argmax(n: int, x: Kind) -> Made | None:
    if not featured(x):
        return None
    keep = n % 2 == 1
    kind = replace(x, shape=(*x.shape[:-1], *([1] if keep else [])), dtype="long", high=x.shape[-1])
    return Made(lambda t: (t + ramp(t)).argmax(-1, keep), (kind,), saves="")


@rule
def greater(n: int, x: Kind) -> Made | None:
    kind = replace(x, dtype="bool") if plain(x) else None
    return Made(lambda t: t > 0.0123 * n, (kind,), saves="") if kind else None


@rule
def less(n: int, a: Kind, b: Kind) -> Made | None:
    kind = broadcast(a, b) if plain(a, b) else None
    return (
        Made(lambda s, t: s < t - 0.0123, (replace(kind, dtype="bool"),), saves="")
        if kind
        else None
    )


@rule
def equals(n: int, i: Kind) -> Made | None:
    kind = replace(i, dtype="bool", high=0) if plain(i, dtype="long") else None
    return Made(lambda t: t == n % i.high, (kind,), saves="") if kind else None


@rule
def invert(n: int, mask: Kind) -> Made | None:
    return Made(lambda t: ~t, (mask,), saves="") if plain(mask, dtype="bool") else None


@rule
def count(n: int, mask: Kind) -> Made | None:
    """How many so far: integers from a mask."""
    if not plain(mask, dtype="bool") or not mask.shape or mask.batch == len(mask.shape):
        return None
    kind = replace(mask, dtype="long", high=mask.shape[-1] + 1)
    return Made(lambda t: t.cumsum(-1), (kind,), saves="")


@rule
def as_float(n: int, i: Kind) -> Made | None:
    if i.dtype not in ("long", "bool") or i.reduced:
        return None
    return Made(lambda t: t.double() / 4 + 0.1, (replace(i, dtype="float", high=0),), saves="")


@rule
def next_of(n: int, i: Kind) -> Made | None:
    run = lambda t: (t + n) % i.high  # noqa: E731
    return Made(run, (i,), saves="") if plain(i, dtype="long") else None


@rule
def quantize(n: int, x: Kind) -> Made | None:
    kind = replace(x, dtype="long", high=6) if plain(x) else None
    return Made(lambda t: (t * 1.7 + 2.2).long().clamp(0, 5), (kind,), saves="") if kind else None


@rule
def one_hot(n: int, i: Kind) -> Made | None:
    if not plain(i, dtype="long") or i.batch not in (0, None) or i.high > 6:
        return None
    kind = replace(i, shape=(*i.shape, i.high), dtype="float", high=0)
    return Made(lambda t: F.one_hot(t, i.high).double(), (kind,), saves="")


@rule
def gather(n: int, x: Kind, i: Kind) -> Made | None:
    """Entries of a sample chosen by integers of the same sample."""
    if not (featured(x) and plain(i, dtype="long") and batch_first(x, i) and i.shape):
        return None
    if i.shape[:-1] != x.shape[:-1]:
        return None
    size = x.shape[-1]
    run = lambda t, j: t.gather(-1, j % size)  # noqa: E731
    return Made(run, (replace(x, shape=i.shape),), saves="i")


@rule
def scatter(n: int, x: Kind, i: Kind) -> Made | None:
    if gather(n, x, i) is None or i.shape[-1] > x.shape[-1]:
        return None
    size, count_ = x.shape[-1], i.shape[-1]
    run = lambda t, j: torch.zeros_like(t).scatter_add(-1, j % size, t[..., :count_])  # noqa: E731
    return Made(run, (x,), saves="i")


@rule
def pick(n: int, x: Kind, i: Kind) -> Made | None:
    """One row per sample, by a pair of index tensors, as classifiers take their last token."""
    if not (plain(x) and plain(i, dtype="long") and batch_first(x, i)) or i.shape or x.rows > 1:
        return None
    if not x.shape or not x.shape[0]:
        return None
    size = x.shape[0]
    run = lambda t, j: t[torch.arange(t.shape[0]), j % size]  # noqa: E731
    return Made(run, (replace(x, shape=x.shape[1:]),), saves="i")


@rule
def look_up(n: int, w: Kind, i: Kind) -> Made | None:
    """Rows of a matrix that is not batched."""
    if not (plain(w) and w.batch is None and plain(i, dtype="long")) or i.batch is None:
        return None
    if not w.shape or not w.shape[0]:
        return None
    size = w.shape[0]
    kind = replace(i, shape=(*i.shape, *w.shape[1:]), dtype="float", high=0)
    return Made(lambda t, j: t[j % size], (kind,), saves="i")


# ----------------------------------------------------------------------------------------- complex


@rule
def as_complex(n: int, x: Kind) -> Made | None:
    if not featured(x) or x.shape[-1] % 2:
        return None
    kind = replace(x, shape=(*x.shape[:-1], x.shape[-1] // 2), dtype="complex")
    run = lambda t: torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())  # noqa: E731
    return Made(run, (kind,), view=True, fixed=True, saves="")


@rule
def rfft(n: int, x: Kind) -> Made | None:
    if not featured(x):
        return None
    kind = replace(x, shape=(*x.shape[:-1], x.shape[-1] // 2 + 1), dtype="complex")
    return Made(torch.fft.rfft, (kind,), saves="")


@rule
def irfft(n: int, z: Kind) -> Made | None:
    if not plain(z, dtype="complex") or not z.shape or z.batch == len(z.shape) or not z.numel:
        return None
    size = 2 * z.shape[-1] - n % 2
    kind = replace(z, shape=(*z.shape[:-1], size), dtype="float")
    return Made(partial(torch.fft.irfft, n=size), (kind,), saves="")


@rule
def magnitude(n: int, z: Kind) -> Made | None:
    kind = replace(z, dtype="float") if plain(z, dtype="complex") else None
    return Made(lambda t: (t * t.conj()).real, (kind,), saves="i") if kind else None
