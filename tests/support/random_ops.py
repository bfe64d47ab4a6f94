"""Elementwise operators and reductions over features, as rules of random models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.random_kinds import (
    RULES,
    Kind,
    Made,
    batch_first,
    broadcast,
    featured,
    plain,
    ramp,
    rule,
)

# ------------------------------------------------------------------------------------- elementwise

UNARY: dict[str, tuple[Callable[..., Tensor], str]] = {
    "relu": (torch.relu, "o"),
    "gelu": (F.gelu, "i"),
    "tanh": (torch.tanh, "o"),
    "sigmoid": (torch.sigmoid, "o"),
    "silu": (F.silu, "i"),
    "sin": (torch.sin, "i"),
    "neg": (torch.neg, ""),
    "square": (lambda t: t.square() * 0.3, "i"),
    "shift": (lambda t: t + 0.7, ""),
    "halve": (lambda t: t / 2, ""),
    "straight_through": (lambda t: t + (torch.round(t * 2) / 2 - t).detach(), ""),
}
BINARY: dict[str, tuple[Callable[..., Tensor], str]] = {
    "add": (torch.add, ""),
    "sub": (lambda a, b: a - 0.6 * b, ""),
    "mul": (torch.mul, "i"),
    "div": (lambda a, b: a / (1 + b * b), "i"),
    "maximum": (torch.maximum, "i"),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.3), ""),
}


def _unary(function: Callable[..., Tensor], saves: str) -> Callable[[int, Kind], Made | None]:
    return lambda n, x: Made(function, (x,), saves=saves) if plain(x) else None


def _binary(
    function: Callable[..., Tensor], saves: str, dtypes: tuple[str, ...]
) -> Callable[[int, Kind, Kind], Made | None]:
    def made(n: int, a: Kind, b: Kind) -> Made | None:
        kind = broadcast(a, b)
        if kind is None or kind.reduced or a.dtype != b.dtype or a.dtype not in dtypes:
            return None
        return Made(function, (kind,), saves=saves)

    return made


for _name, (_function, _saves) in UNARY.items():
    RULES[_name] = _unary(_function, _saves)
for _name, (_function, _saves) in BINARY.items():
    _dtypes = ("float", "complex") if _name in ("add", "sub", "mul") else ("float",)
    RULES[_name] = _binary(_function, _saves, _dtypes)
RULES["both"] = _binary(torch.logical_and, "", ("bool",))
RULES["either"] = _binary(lambda a, b: a | b, "", ("bool",))


@rule
def where(n: int, mask: Kind, a: Kind, b: Kind) -> Made | None:
    kind = broadcast(a, b, mask) if plain(mask, dtype="bool") and plain(a, b) else None
    return Made(torch.where, (kind,), saves="i") if kind is not None else None


@rule
def masked_fill(n: int, x: Kind, mask: Kind) -> Made | None:
    kind = broadcast(x, mask) if plain(mask, dtype="bool") and plain(x) else None
    return Made(lambda t, m: t.masked_fill(m, -n / 4), (kind,), saves="i") if kind else None


@rule
def cat(n: int, a: Kind, b: Kind) -> Made | None:
    if a.dtype != b.dtype or not a.shape or a.batch != b.batch or a.rows != b.rows:
        return None
    axis = n % len(a.shape)
    rest = [(*k.shape[:axis], *k.shape[axis + 1 :]) for k in (a, b)]
    if a.reduced or b.reduced or len(a.shape) != len(b.shape) or rest[0] != rest[1]:
        return None
    shape = (*a.shape[:axis], a.shape[axis] + b.shape[axis], *a.shape[axis + 1 :])
    kind = replace(a, shape=shape, high=max(a.high, b.high))
    dim = a.axis(axis)
    return Made(lambda s, t: torch.cat([s, t], dim), (kind,), saves="")


@rule
def stack(n: int, a: Kind, b: Kind) -> Made | None:
    if replace(a, high=0) != replace(b, high=0) or a.batch != 0 or a.reduced:
        return None
    axis = n % (len(a.shape) + 1)
    kind = replace(a, shape=(*a.shape[:axis], 2, *a.shape[axis:]), high=max(a.high, b.high))
    return Made(lambda s, t: torch.stack([s, t], axis + 1), (kind,), saves="")


# ---------------------------------------------------------------------- over features, reductions


@rule
def softmax(n: int, x: Kind) -> Made | None:
    function = F.log_softmax if n % 3 == 2 else F.softmax
    return Made(partial(function, dim=-1), (x,), saves="o") if featured(x) else None


@rule
def cumsum(n: int, x: Kind) -> Made | None:
    return Made(lambda t: t.cumsum(-1), (x,), saves="") if featured(x) else None


@rule
def flip(n: int, x: Kind) -> Made | None:
    run = (lambda t: t.flip(-1)) if n % 2 else (lambda t: t.roll(1, -1))
    return Made(run, (x,), saves="") if featured(x) else None


@rule
def pad(n: int, x: Kind) -> Made | None:
    kind = replace(x, shape=(*x.shape[:-1], x.shape[-1] + 1)) if featured(x) else None
    return Made(lambda t: F.pad(t, (n % 2, 1 - n % 2)), (kind,), saves="") if kind else None


@rule
def reduce(n: int, x: Kind) -> Made | None:
    """Over the features of each sample."""
    if not featured(x):
        return None
    keep = n % 2 == 1
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.sum(-1, keep),
        lambda t: t.mean(-1, keep),
        lambda t: (t + ramp(t)).amax(-1, keep),
        lambda t: torch.logsumexp(t, -1, keep),
        lambda t: (1 + t.square().sum(-1, keep)).sqrt(),
        lambda t: (t * ramp(t)).sum(-1, keep),
    ]
    kind = replace(x, shape=(*x.shape[:-1], *([1] if keep else [])))
    return Made(functions[n // 2], (kind,))


@rule
def total(n: int, x: Kind) -> Made | None:
    """Over all that belongs to one sample, be it empty; of what is not batched, one number."""
    if not plain(x) or not x.shape:
        return None
    dims = [x.axis(i) for i in range(len(x.shape))]
    return Made(lambda t: t.sum(dims), (replace(x, shape=(), batch=x.batch and 0),), saves="")


@rule
def pool(n: int, x: Kind) -> Made | None:
    if not (plain(x) and batch_first(x) and len(x.shape) in (2, 3)) or min(x.shape[1:]) < 2:
        return None
    names = ("max_pool1d", "avg_pool1d") if len(x.shape) == 2 else ("max_pool2d", "avg_pool2d")
    function = partial(getattr(F, names[n % 2]), kernel_size=2)
    kind = replace(x, shape=(x.shape[0], *(s // 2 for s in x.shape[1:])))
    return Made(function, (kind,)) if x.shape[0] else None


@rule
def upsample(n: int, x: Kind) -> Made | None:
    if not (plain(x) and batch_first(x) and len(x.shape) == 3 and x.numel):
        return None
    function = partial(F.interpolate, scale_factor=2, mode="bilinear" if n % 2 else "nearest")
    return Made(function, (replace(x, shape=(x.shape[0], 2 * x.shape[1], 2 * x.shape[2])),))


@rule
def sort(n: int, x: Kind) -> Made | None:
    if not featured(x):
        return None
    index = replace(x, dtype="long", high=x.shape[-1])
    return Made(lambda t: tuple((t + ramp(t)).sort(dim=-1, stable=True)), (x, index))


@rule
def topk(n: int, x: Kind) -> Made | None:
    if not featured(x):
        return None
    k = 1 + n % x.shape[-1]
    kind = replace(x, shape=(*x.shape[:-1], k))
    index = replace(kind, dtype="long", high=x.shape[-1])
    return Made(lambda t: tuple((t + ramp(t)).topk(k, -1)), (kind, index))
