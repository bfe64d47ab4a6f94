"""The operators of random models that look at memory in another way, or write to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.support.random_kinds import RULES, Kind, Made, batch_first, broadcast, plain, rule


def _resized(x: Kind, axis: int, *sizes: int) -> Kind:
    """With one dimension replaced."""
    return replace(x, shape=(*x.shape[:axis], *sizes, *x.shape[axis + 1 :]))


# ------------------------------------------------------------------------------------------- views


@rule
def transpose(n: int, x: Kind) -> Made | None:
    """Two dimensions of a sample exchanged: the value is not contiguous any more."""
    if len(x.shape) < 2:
        return None
    i = n % (len(x.shape) - 1)
    shape = list(x.shape)
    shape[i], shape[i + 1] = shape[i + 1], shape[i]
    a, b = x.axis(i), x.axis(i + 1)
    return Made(lambda t: t.transpose(a, b), (replace(x, shape=tuple(shape)),), view=True, saves="")


@rule
def permute(n: int, x: Kind) -> Made | None:
    """All dimensions rotated, the batch among them."""
    if not x.shape or x.reduced:
        return None
    by = 1 + n % len(x.sizes)
    order = [(i + by) % len(x.sizes) for i in range(len(x.sizes))]
    kind = x.of_sizes(tuple(x.sizes[i] for i in order))
    return Made(lambda t: t.permute(order), (kind,), view=True, saves="") if kind else None


@rule
def batch_second(n: int, x: Kind) -> Made | None:
    """From batch-first to time-first, or back."""
    if not x.shape or x.batch not in (0, 1):
        return None
    return Made(lambda t: t.transpose(0, 1), (replace(x, batch=1 - x.batch),), view=True, saves="")


@rule
def unsqueeze(n: int, x: Kind) -> Made | None:
    if x.reduced or len(x.shape) > 3:
        return None
    axis = n % (len(x.shape) + 1)
    dim = axis + 1 if x.batch is not None and axis >= x.batch else axis
    shift = x.batch is not None and dim <= x.batch
    kind = replace(
        x,
        shape=(*x.shape[:axis], 1, *x.shape[axis:]),
        batch=x.batch + 1 if shift and x.batch is not None else x.batch,
    )
    return Made(lambda t: t.unsqueeze(dim), (kind,), view=True, saves="")


@rule
def select(n: int, x: Kind) -> Made | None:
    """One entry of a dimension."""
    if not x.shape or x.reduced:
        return None
    axis = n % len(x.shape)
    if not x.shape[axis]:
        return None
    dim, index = x.axis(axis), n % x.shape[axis]
    sizes = x.sizes
    kind = x.of_sizes((*sizes[:dim], *sizes[dim + 1 :]))
    return Made(lambda t: t.select(dim, index), (kind,), view=True, saves="") if kind else None


@rule
def op_slice(n: int, x: Kind) -> Made | None:
    """Part of a dimension, or none of it."""
    if not x.shape or x.reduced:
        return None
    axis = n % len(x.shape)
    size = x.shape[axis]
    part = [slice(1, None), slice(None, None, 2), slice(0, -1)][n // 2 % 3]
    part = slice(0, 0) if n in (7, 11) else part
    index = [slice(None)] * x.axis(axis) + [part]
    kind = _resized(x, axis, len(range(size)[part]))
    return Made(lambda t: t[tuple(index)], (kind,), view=True, saves="")


def _pieces(name: str) -> Callable[[int, Kind], Made | None]:
    def made(n: int, x: Kind) -> Made | None:
        if not x.shape or x.reduced:
            return None
        axis = n % len(x.shape)
        size, dim = x.shape[axis], x.axis(axis)
        if not 2 <= size <= 6:
            return None
        if name == "unbind":
            sizes = x.sizes
            kind = x.of_sizes((*sizes[:dim], *sizes[dim + 1 :]))
            if kind is None:
                return None
            return Made(lambda t: t.unbind(dim), (kind,) * size, view=True, fixed=True, saves="")
        lengths = [(size + 1) // 2, size // 2] if name == "chunk" else [1, size - 1]
        run: Callable[[Tensor], Any] = lambda t: t.split(lengths, dim)  # noqa: E731
        if name == "chunk":
            run = lambda t: t.chunk(2, dim)  # noqa: E731
        kinds = tuple(_resized(x, axis, s) for s in lengths)
        return Made(run, kinds, view=True, fixed=True, saves="")

    return made


for _name in ("chunk", "split", "unbind"):
    RULES[_name] = _pieces(_name)


@rule
def flatten(n: int, x: Kind) -> Made | None:
    """All that belongs to a sample in one dimension, by a view if strides allow it."""
    if not batch_first(x) or len(x.shape) < 2:
        return None
    kind = replace(x, shape=(x.numel // x.rows,))
    run = (lambda t: t.flatten(1)) if x.numel == 0 else (lambda t: t.reshape(t.shape[0], -1))
    return Made(run, (kind,), view=True, fixed=True, saves="")


@rule
def unflatten(n: int, x: Kind) -> Made | None:
    """The last dimension in two."""
    if not x.shape or x.batch == len(x.shape) or x.shape[-1] not in (4, 6, 8, 9, 12) or x.reduced:
        return None
    first = {4: 2, 6: 3, 8: 4, 9: 3, 12: 3}[x.shape[-1]]
    kind = _resized(x, len(x.shape) - 1, first, x.shape[-1] // first)
    return Made(lambda t: t.unflatten(-1, (first, -1)), (kind,), view=True, saves="")


@rule
def merge(n: int, x: Kind) -> Made | None:
    """Rows of all samples one after another, as for a loss over tokens."""
    if not batch_first(x) or not x.shape or not x.shape[0]:
        return None
    kind = replace(x, shape=x.shape[1:], rows=x.rows * x.shape[0])
    return Made(lambda t: t.flatten(0, 1), (kind,), view=True, fixed=True, saves="")


@rule
def unmerge(n: int, x: Kind, like: Kind) -> Made | None:
    """Back to samples; their number is read off another value."""
    if x.batch != 0 or x.rows == 1 or like.batch != 0 or like.rows > 1 or not x.numel:
        return None
    rows = x.rows
    kind = replace(x, shape=(rows, *x.shape), rows=1)
    run = lambda t, s: t.reshape(s.shape[0], rows, *t.shape[1:])  # noqa: E731
    return Made(run, (kind,), view=True, fixed=True, saves="")


@rule
def expand(n: int, x: Kind) -> Made | None:
    """A dimension of one entry repeated without a copy."""
    if 1 not in x.shape or x.reduced:
        return None
    axis = x.shape.index(1)
    kind = _resized(x, axis, 2 + n % 2)
    sizes = [s if i == x.axis(axis) else -1 for i, s in enumerate(kind.sizes)]
    return Made(lambda t: t.expand(sizes), (kind,), view=True, fixed=True, saves="")


@rule
def for_each_sample(n: int, w: Kind, like: Kind) -> Made | None:
    """What is not batched, repeated for every sample of another value."""
    if w.batch is not None or w.reduced or like.batch != 0 or like.rows > 1:
        return None
    run = lambda t, s: t.expand(s.shape[0], *t.shape)  # noqa: E731
    return Made(run, (replace(w, batch=0),), view=True, fixed=True, saves="")


@rule
def filled(n: int, like: Kind) -> Made | None:
    """New values, as many as there are samples."""
    if like.batch != 0 or like.rows > 1 or like.reduced:
        return None
    size = n % 4
    run = (
        lambda t: t.new_full((t.shape[0], size), 0.4, dtype=torch.float64),
        lambda t: torch.ones(t.shape[0], size, dtype=torch.float64),
        lambda t: torch.arange(size, dtype=torch.float64).repeat(t.shape[0], 1),
    )[n // 4]
    return Made(run, (Kind((size,)),), saves="")


@rule
def arange(n: int) -> Made | None:
    size = 2 + n % 4
    kind = Kind((size,), "long", None, high=size)
    return Made(lambda: torch.arange(size), (kind,), saves="")


@rule
def lower_triangle(n: int) -> Made | None:
    size = 1 + n % 5
    run = lambda: torch.ones(size, size, dtype=torch.bool).tril()  # noqa: E731
    return Made(run, (Kind((size, size), "bool", None),), saves="")


@rule
def constant(n: int) -> Made | None:
    numbers = [0.1 * i + 0.3 for i in range(n % 4 + 1)]
    run = lambda: torch.tensor(numbers, dtype=torch.float64)  # noqa: E731
    return Made(run, (Kind((len(numbers),), batch=None),), saves="", fixed=True)


@rule
def alias(n: int, x: Kind) -> Made | None:
    """The same memory once more, or the same object."""
    run = (lambda t: t, lambda t: t[...], lambda t: t.view_as(t), lambda t: t.to(t.dtype))[n % 4]
    return Made(run, (x,), view=True, saves="") if not x.reduced else None


@rule
def detach(n: int, x: Kind) -> Made | None:
    return Made(lambda t: t.detach(), (x,), view=True, saves="") if not x.reduced else None


@rule
def clone(n: int, x: Kind) -> Made | None:
    return Made(lambda t: t.clone(), (x,), saves="") if not x.reduced else None


@rule
def contiguous(n: int, x: Kind) -> Made | None:
    ok = not x.reduced
    return Made(lambda t: t.contiguous(), (x,), view=True, fixed=True, saves="") if ok else None


@rule
def conj(n: int, z: Kind) -> Made | None:
    """Lazy: a bit on the same memory."""
    ok = plain(z, dtype="complex")
    return Made(lambda t: t.conj(), (z,), view=True, fixed=True, saves="") if ok else None


@rule
def real_part(n: int, z: Kind) -> Made | None:
    if not plain(z, dtype="complex"):
        return None
    run = (lambda t: t.real) if n % 2 else (lambda t: t.imag)
    return Made(run, (replace(z, dtype="float"),), view=True, fixed=True, saves="")


@rule
def as_real(n: int, z: Kind) -> Made | None:
    if not plain(z, dtype="complex"):
        return None
    run = lambda t: torch.view_as_real(t.resolve_conj())  # noqa: E731
    kind = replace(z, shape=(*z.shape, 2), dtype="float")
    return Made(run, (kind,), view=True, fixed=True, saves="")


# ---------------------------------------------------------------------------------------- in place

WRITES: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "relu_": (torch.relu_, "float", "o"),
    "tanh_": (torch.tanh_, "float", "o"),
    "neg_": (torch.neg_, "float", ""),
    "clamp_": (lambda t: t.clamp_(-0.7654, 1.1234), "float", ""),
    "add_number_": (lambda t: t.add_(0.3), "float", ""),
    "mul_number_": (lambda t: t.mul_(-0.6), "float", ""),
    "not_": (lambda t: t.logical_not_(), "bool", ""),
}


def _write(
    function: Callable[..., Tensor], dtype: str, saves: str
) -> Callable[[int, Kind], Made | None]:
    return lambda n, x: (
        Made(function, (x,), view=True, writes=True, saves=saves) if plain(x, dtype=dtype) else None
    )


for _name, _entry in WRITES.items():
    RULES[_name] = _write(*_entry)


def _write_two(function: Callable[..., Tensor], saves: str) -> Callable[[int, Kind, Kind], Any]:
    def made(n: int, x: Kind, y: Kind) -> Made | None:
        if not plain(x, y) or broadcast(x, y) != x:
            return None
        return Made(function, (x,), view=True, writes=True, saves=saves)

    return made


RULES["add_"] = _write_two(lambda a, b: a.add_(b, alpha=0.7), "")
RULES["mul_"] = _write_two(lambda a, b: a.mul_(b), "i")
RULES["copy_"] = _write_two(lambda a, b: a.copy_(b), "")


@rule
def masked_fill_(n: int, x: Kind, mask: Kind) -> Made | None:
    if not plain(x) or not plain(mask, dtype="bool") or broadcast(x, mask) != x:
        return None
    return Made(lambda t, m: t.masked_fill_(m, n / 5), (x,), view=True, writes=True, saves="i")


@rule
def increase_(n: int, i: Kind) -> Made | None:
    if not plain(i, dtype="long"):
        return None
    run = lambda t: t.add_(n).remainder_(i.high)  # noqa: E731
    return Made(run, (i,), view=True, writes=True, saves="")


@rule
def assign(n: int, x: Kind, y: Kind) -> Made | None:
    """``x[..., n] = y``."""
    if not plain(x, y) or not x.shape or x.batch == len(x.shape) or not x.shape[-1]:
        return None
    if replace(x, shape=x.shape[:-1]) != y:
        return None
    index = n % x.shape[-1]

    def run(a: Tensor, b: Tensor) -> Tensor:
        a[..., index] = b
        return a

    return Made(run, (x,), view=True, writes=True, saves="")
