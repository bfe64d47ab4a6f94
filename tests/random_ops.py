"""The operators of random models that compute: layers, elementwise, reductions, integers, losses.

Those that only look at memory in another way, or write to it, stand in `random_views`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .random_kinds import RULES, Kind, Made, batch_first, broadcast, featured, plain, ramp, rule

# ------------------------------------------------------------------------------------------ layers


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
    """Only in evaluation does it have a rate (see `random_models.build`): then it is an alias."""
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


# ------------------------------------------------------------------------------------------ losses


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
