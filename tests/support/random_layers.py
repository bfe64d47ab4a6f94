"""Layers, attention and products with matrices, as rules of random models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.random_kinds import Kind, Made, batch_first, featured, plain, rule


@rule
def linear(n: int, x: Kind) -> Made | None:
    if not featured(x):
        return None
    out = 1 + n % 5
    layer = ("linear", x.shape[-1], out, n < 9)
    kind = replace(x, shape=(*x.shape[:-1], out))
    return Made(lambda m, t: m(t), (kind,), layer, saves="i")


@rule
def conv1d(n: int, x: Kind) -> Made | None:
    if not (plain(x) and batch_first(x) and len(x.shape) == 2 and x.numel):
        return None
    out, kernel = 2 + n % 3, 1 + 2 * (n % 2)
    layer = ("conv1d", x.shape[0], out, kernel)
    return Made(lambda m, t: m(t), (replace(x, shape=(out, x.shape[1])),), layer, saves="i")


@rule
def conv2d(n: int, x: Kind) -> Made | None:
    if not (plain(x) and batch_first(x) and len(x.shape) == 3 and x.numel):
        return None
    out, kernel = 2 + n % 3, 1 + 2 * (n % 2)
    layer = ("conv2d", x.shape[0], out, kernel)
    return Made(lambda m, t: m(t), (replace(x, shape=(out, *x.shape[1:])),), layer, saves="i")


@rule
def layer_norm(n: int, x: Kind) -> Made | None:
    if not featured(x) or x.shape[-1] < 3:
        return None
    return Made(lambda m, t: m(t), (x,), ("layer_norm", x.shape[-1]), saves="i")


@rule
def group_norm(n: int, x: Kind) -> Made | None:
    if not (plain(x) and batch_first(x) and x.shape and x.shape[0] % 2 == 0):
        return None
    if x.numel // x.rows < 6:
        return None
    groups = 1 + n % 2
    return Made(lambda m, t: m(t), (x,), ("group_norm", groups, x.shape[0]), saves="i")


@rule
def fixed_batch_norm(n: int, x: Kind) -> Made | None:
    """By the running statistics, in training too: a layer full of buffers."""
    if not (plain(x) and batch_first(x) and x.shape and x.numel):
        return None
    return Made(
        lambda m, t: F.batch_norm(t, m.running_mean, m.running_var, m.weight, m.bias),
        (x,),
        ("batch_norm", x.shape[0]),
        saves="i",
    )


@rule
def dropout(n: int, x: Kind) -> Made | None:
    """Only in evaluation does it have a rate (see `RandomModel`): then it is an alias."""
    return (
        Made(lambda m, t: m(t), (x,), ("dropout",), view=True, fixed=True) if featured(x) else None
    )


@rule
def embedding(n: int, i: Kind) -> Made | None:
    if not plain(i, dtype="long") or i.batch not in (0, None) or i.high > 12:
        return None
    dim = 1 + n % 5
    kind = replace(i, shape=(*i.shape, dim), dtype="float")
    return Made(lambda m, t: m(t), (kind,), ("embedding", i.high, dim), saves="i")


@rule
def gru(n: int, x: Kind) -> Made | None:
    if not (featured(x) and batch_first(x) and len(x.shape) == 2 and x.shape[0] > 0):
        return None
    out = 1 + n % 3
    kind = replace(x, shape=(x.shape[0], out))
    return Made(lambda m, t: m(t)[0], (kind,), ("gru", x.shape[1], out))


@rule
def attention(n: int, q: Kind, k: Kind, v: Kind) -> Made | None:
    if not (featured(q, k, v) and batch_first(q, k, v) and len(q.shape) in (2, 3)):
        return None
    if k.shape != v.shape or len(q.shape) != len(k.shape):
        return None
    if q.shape[-1] != k.shape[-1] or q.shape[:-2] != k.shape[:-2]:
        return None
    if not (q.numel and k.numel):
        return None
    causal = n % 2 == 1
    return Made(partial(F.scaled_dot_product_attention, is_causal=causal), (q,))


@rule
def masked_attention(n: int, x: Kind, mask: Kind) -> Made | None:
    if not (featured(x) and batch_first(x) and len(x.shape) == 2 and x.numel):
        return None
    wanted = replace(x, shape=(x.shape[0], x.shape[0]), dtype="bool", high=0)
    if mask not in (wanted, replace(wanted, batch=None, rows=1)):
        return None

    def run(t: Tensor, m: Tensor) -> Tensor:
        bias = torch.where(m, 0.0, -3.0).to(t.dtype)
        return F.scaled_dot_product_attention(t, t, t, attn_mask=bias)

    return Made(run, (x,))


@rule
def matmul(n: int, x: Kind, w: Kind) -> Made | None:
    """By a matrix that is no layer's: a parameter, perhaps a tied one, or computed from one."""
    if not (featured(x) and plain(w) and w.batch is None and len(w.shape) == 2):
        return None
    if w.shape[0] != x.shape[-1] or not w.shape[1]:
        return None
    return Made(torch.matmul, (replace(x, shape=(*x.shape[:-1], w.shape[1])),), saves="i")


@rule
def project(n: int, x: Kind, w: Kind) -> Made | None:
    if not (featured(x) and plain(w) and w.batch is None and len(w.shape) == 2):
        return None
    if w.shape[1] != x.shape[-1] or not w.shape[0]:
        return None
    return Made(F.linear, (replace(x, shape=(*x.shape[:-1], w.shape[0])),), saves="i")


@rule
def batched_matmul(n: int, a: Kind, b: Kind) -> Made | None:
    if not (featured(a, b) and batch_first(a, b) and len(a.shape) == len(b.shape) == 2):
        return None
    if a.shape[1] != b.shape[0]:
        return None
    return Made(torch.bmm, (replace(a, shape=(a.shape[0], b.shape[1])),), saves="i")
