"""Fake results of operators whose fakes take symbolic sizes not at all, or slowly.

For symbolic sizes torch runs a decomposition in Python for each of these operators; that of a
norm's backward takes 50 ms. The shapes of their results are known. All else is taken from the same
operator's result for the example sizes: dtype, device, and the order of dimensions in memory.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.passes._torch import FakeTensorMode
from autopipe.passes.one_at_a_time import replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

aten = torch.ops.aten

Shape = tuple[Any, ...]


@contextmanager
def known_shapes() -> Iterator[None]:
    """Let torch's own fake modes in this thread compute symbolic results as `shaped_results`."""
    dispatch: Any = FakeTensorMode.dispatch

    def shaped(
        mode: FakeTensorMode, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        symbolic = mode.shape_env is not None
        result = shaped_results(mode, func, args, kwargs or {}) if symbolic else None
        return dispatch(mode, func, types, args, kwargs or {}) if result is None else result

    with replaced(FakeTensorMode, "dispatch", shaped):
        yield


def shaped_results(
    mode: FakeTensorMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Compute the fake result of an operator with symbolic sizes.

    Args:
        mode: of its tensors, with symbolic sizes.
        func: the operator.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The result; None if the operator is none of this file's, or its arguments are unusual.
    """
    rule = RULES.get(func)
    shapes = rule(args) if rule is not None else None
    if shapes is None:
        return None
    known, options = pytree.tree_map_only(
        (Tensor, torch.SymInt), of_example, (list(args), dict(kwargs))
    )
    examples = func(*known, **options)
    several = isinstance(examples, (tuple, list))
    outputs = tuple(examples) if several else (examples,)
    pairs = [(e, s) for e, s in zip(outputs, shapes, strict=True) if e is not None]
    strides = [dense_strides(shape, example.stride()) for example, shape in pairs]
    agree = (tuple(map(of_example, shape)) == tuple(example.shape) for example, shape in pairs)
    if None in strides or not all(agree):
        return None
    with mode:
        made = iter(
            [
                torch.empty_strided(shape, steps, dtype=example.dtype, device=example.device)
                for (example, shape), steps in zip(pairs, strides, strict=True)
                if steps is not None
            ]
        )
    results = tuple(None if example is None else next(made) for example in outputs)
    return results if several else results[0]


EXAMPLES = FakeTensorMode()
"""The mode of the tensors that `of_example` returns."""


def of_example(value: Any) -> Any:
    """Return a symbolic size, or a tensor, as it is in the example that is traced.

    Args:
        value: other values are returned as they are.
    """
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    shape, stride = (list(map(of_example, n)) for n in (value.shape, value.stride()))
    with EXAMPLES:
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)


def dense_strides(shape: Sequence[Any], example: Sequence[int]) -> tuple[Any, ...] | None:
    """Return the strides of a dense tensor with symbolic sizes.

    Args:
        shape: its sizes.
        example: its strides for the example sizes: the order of dimensions in memory.

    Returns:
        The strides; None if those of the example are not those of a dense tensor.
    """
    sizes = list(map(of_example, shape))
    found: dict[int, Any] = {}
    step: Any = 1
    for d in sorted(range(len(sizes)), key=lambda d: (example[d], sizes[d], -d)):
        if of_example(step) != example[d]:
            return None
        found[d] = step
        step = step * shape[d]
    return tuple(found[d] for d in range(len(sizes)))


def _same(args: Sequence[Any]) -> tuple[Shape] | None:
    """The common shape of all tensors."""
    first, *others = (tuple(x.shape) for x in args if isinstance(x, Tensor))
    return (first,) if all(map(_equal, others, [first] * len(others))) else None


def _equal(one: Shape, other: Shape) -> bool:
    """Whether two shapes are the same expressions; to compare sizes would be a condition."""

    def known(shape: Shape) -> list[Any]:
        return [n.node.expr if isinstance(n, torch.SymInt) else n for n in shape]

    return known(one) == known(other)


def _layer_norm(args: Sequence[Any]) -> tuple[Shape, ...]:
    shape, dims = tuple(args[0].shape), len(args[1])
    statistics = (*shape[: len(shape) - dims], *[1] * dims)
    return shape, statistics, statistics


def _layer_norm_backward(args: Sequence[Any]) -> tuple[Shape, ...]:
    return tuple(args[1].shape), tuple(args[2]), tuple(args[2])


def _group_norm(args: Sequence[Any]) -> tuple[Shape, ...]:
    _, _, _, samples, _, _, groups, _ = args
    return tuple(args[0].shape), (samples, groups), (samples, groups)


def _group_norm_backward(args: Sequence[Any]) -> tuple[Shape, ...]:
    channels = args[6]
    return tuple(args[1].shape), (channels,), (channels,)


def _upsample(args: Sequence[Any]) -> tuple[Shape]:
    return ((*args[0].shape[:2], *args[1]),)


def _upsample_backward(args: Sequence[Any]) -> tuple[Shape]:
    return (tuple(args[2]),)


RULES: dict[Any, Callable[[Sequence[Any]], tuple[Shape, ...] | None]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
}
"""Operator → the shapes of its results, given its arguments."""

for _name in (
    *("_softmax", "_log_softmax", "_safe_softmax"),
    *("_softmax_backward_data", "_log_softmax_backward_data"),
    *("gelu", "gelu_backward", "silu_backward", "mish_backward", "elu_backward"),
    *("hardswish_backward", "hardsigmoid_backward", "leaky_relu_backward", "softplus_backward"),
):
    RULES[getattr(aten, _name).default] = _same

for _name in (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
):
    RULES[getattr(aten, _name).default] = _upsample
    RULES[getattr(aten, f"{_name}_backward").default] = _upsample_backward
