"""Fake results with symbolic sizes against real kernels, at sizes other than the example's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopipe.passes._torch import ShapeEnv
from autopipe.passes._torch_sizes import create_size_symbol, size_of_expression
from autopipe.passes.graph import fake_mode
from autopipe.passes.graph.fake_shapes import RULES, dense_strides, shaped_results

B, N = sympy.Symbol("B", integer=True), sympy.Symbol("N", integer=True)
SIZES = ({B: 3, N: 10}, {B: 5, N: 14}, {B: 2, N: 22})
EXPRESSIONS = (B, N, 2 * N, N / 2, 3 * N / 2, N**2, 2 * N * N, B * N, 4 * B)
CHANNELS = 4


class Noted(TorchDispatchMode):
    """Notes the calls of operators that have a rule, and their real results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in RULES:
            self.calls.append((func, (args, kwargs or {}), result))
        return result


def calls(function: Callable[[Tensor], Tensor], x: Tensor) -> list[tuple[Any, Any, Any]]:
    """What a function and its backward call."""
    x = x.requires_grad_()
    with Noted() as noted:
        y = function(x)
        torch.autograd.grad(y, x, torch.randn_like(y))
    return noted.calls


def number(values: Sequence[int], real: dict[Any, Any]) -> Any:
    """A size that has one value for each of `SIZES`."""
    if len(set(values)) == 1:
        return values[0]
    for expr in EXPRESSIONS:
        if [expr.xreplace(sizes) for sizes in SIZES] == list(values):
            return size_of_expression(real["environment"], expr.xreplace(real), values[0])
    raise AssertionError(f"no expression has the values {values}")


def with_symbols(values: Sequence[Any], real: dict[Any, Any]) -> Any:
    """An argument that differs between calls, as one with symbolic sizes."""
    first = values[0]
    if isinstance(first, Tensor):
        shape = [number(n, real) for n in zip(*(v.shape for v in values), strict=True)]
        strides = dense_strides(shape, first.stride())
        assert strides is not None
        return torch.empty_strided(shape, strides, dtype=first.dtype)
    if isinstance(first, int) and not isinstance(first, bool):
        return number(values, real)
    assert all(v == first for v in values)
    return first


IMAGE = (B, CHANNELS, N, N)
TEXT = (B, N, 8)
CASES: list[tuple[tuple[Any, ...], Callable[[Tensor], Tensor]]] = [
    (TEXT, nn.LayerNorm(8)),
    (TEXT, nn.LayerNorm(8, elementwise_affine=False)),
    ((B, N, 2, 4), nn.LayerNorm((2, 4))),
    (IMAGE, nn.GroupNorm(2, CHANNELS)),
    ((B, CHANNELS, N), nn.GroupNorm(1, CHANNELS)),
    (IMAGE, nn.GroupNorm(4, CHANNELS, affine=False)),
    (TEXT, lambda x: x.softmax(-1)),
    (TEXT, lambda x: x.transpose(0, 1).log_softmax(1)),
    ((B, 2, N, N), lambda x: torch.ops.aten._safe_softmax(x, -1)),
    (TEXT, F.gelu),
    (IMAGE, lambda x: F.gelu(x, approximate="tanh")),
    *((TEXT, f) for f in (F.silu, F.mish, F.elu, F.hardswish, F.hardsigmoid, F.softplus)),
    (IMAGE, lambda x: F.leaky_relu(x, 0.1)),
    ((B, CHANNELS, N), lambda x: F.interpolate(x, [2 * x.shape[2]])),
    ((B, CHANNELS, N), lambda x: F.interpolate(x, [2 * x.shape[2]], mode="linear")),
    ((B, CHANNELS, N), lambda x: F.interpolate(x, [2 * x.shape[2]], mode="nearest-exact")),
    *(
        (
            IMAGE,
            lambda x, mode=mode, more=more: F.interpolate(
                x, [2 * x.shape[2], x.shape[3] // 2], mode=mode, **more
            ),
        )
        for mode, more in (
            *(("nearest", {}), ("nearest-exact", {}), ("bilinear", {}), ("bicubic", {})),
            *(("bilinear", {"antialias": True}), ("bicubic", {"antialias": True})),
        )
    ),
    *(
        (
            (*IMAGE, N),
            lambda x, mode=mode: F.interpolate(x, [2 * n for n in x.shape[2:]], mode=mode),
        )
        for mode in ("nearest", "nearest-exact", "trilinear")
    ),
]


@pytest.mark.parametrize("last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_results_are_those_of_the_kernel(case: int, last: bool) -> None:
    shape, function = CASES[case]
    torch.manual_seed(0)
    real_calls = []
    for sizes in SIZES:
        known = [n if isinstance(n, int) else int(n.xreplace(sizes)) for n in shape]
        x = torch.randn(known)
        if last and len(shape) > 3:
            x = torch.randn(known[0], *known[2:], known[1]).movedim(-1, 1)
        elif last:
            x = torch.randn(*known[1:], known[0]).movedim(-1, 0)
        real_calls.append(calls(function, x))
    assert len(real_calls[0]) >= 1
    for alike in zip(*real_calls, strict=True):
        check([c for c in alike if isinstance(c, tuple)])


def check(alike: list[tuple[Any, Any, Any]]) -> None:
    """One operator called with the sizes of each of `SIZES`; the first is the example."""
    environment = ShapeEnv()
    real: dict[Any, Any] = {"environment": environment}
    symbols = {}
    for size, n in SIZES[0].items():
        symbols[size], _ = create_size_symbol(environment, str(size), n)
    real |= symbols
    func = alike[0][0]
    mode = fake_mode(environment)
    leaves = [pytree.tree_flatten(c[1]) for c in alike]
    with mode:
        given = [with_symbols(values, real) for values in zip(*(f for f, _ in leaves), strict=True)]
    args, kwargs = pytree.tree_unflatten(given, leaves[0][1])
    found = shaped_results(mode, func, args, kwargs)
    assert found is not None
    # Where a half of a size is 1, other strides may be right.
    assert all(isinstance(g.expr, sympy.Ne) and g.expr.rhs == 1 for g in environment.guards)
    with mode:  # strides may be corrected
        found = func(*args, **kwargs)
    for sizes, (_, _, expected) in zip(SIZES, alike, strict=True):
        values = {symbols[s]: n for s, n in sizes.items()}
        for fake, right in zip(
            pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True
        ):
            assert (fake is None) == (right is None)
            if right is None:
                continue
            assert fake.dtype == right.dtype
            for mine, theirs in ((fake.shape, right.shape), (fake.stride(), right.stride())):
                assert [at(n, values) for n in mine] == list(theirs), (func, sizes)


def at(size: Any, values: dict[Any, int]) -> int:
    return int(size.node.expr.xreplace(values)) if isinstance(size, torch.SymInt) else size


def test_shapes_that_may_differ_are_left_to_torch() -> None:
    """Whether they are equal would be a condition of the trace."""
    environment = ShapeEnv()
    sizes = [create_size_symbol(environment, name, 6)[1] for name in "nm"]
    mode = fake_mode(environment)
    with mode:
        x, y = (torch.empty(4, n) for n in sizes)
    assert shaped_results(mode, torch.ops.aten.gelu_backward.default, (x, y), {}) is None
    assert shaped_results(mode, torch.ops.aten.mul.Tensor, (x, x), {}) is None
    assert environment.guards == []
