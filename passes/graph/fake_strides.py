"""Fake tensors with the strides that real kernels return.

Fake tensors have the right shapes and dtypes, but not always the right strides: for a dimension of
size one, torch's fake often has another stride than the kernel's result. That matters. An
upsampling, a norm or a convolution chooses the memory format of its result by *all* strides of its
argument (`suggest_memory_format`), so one wrong stride, in a batch of one sample, changes the order
of dimensions in memory. That order decides which kernel a matrix product uses, whether `contiguous`
copies, and whether `view` is possible.

This module corrects the operators that real models need: views, pointwise arithmetic, `*_like`
factories, norms, upsampling. It does not correct flip, roll, index, tril, glu, prelu, hardswish's
backward and reflection padding. Therefore a stage accepts a tensor from another stage with any
strides: cutting changes nothing, and only decisions within one trace can differ.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.passes._torch import (
    FakeTensorMode,
    OpOverload,
    ShapeEnv,
    enable_python_dispatcher,
    suggest_memory_format,
)

from .fake_shapes import dense_strides, of_example, shaped_results

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default)

DENSE = {
    aten._log_softmax.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
}
"""Operators whose first result is always contiguous."""

SUGGESTED = {
    aten.native_group_norm.default: 0,
    aten.native_group_norm_backward.default: 1,
    aten.native_batch_norm.default: 0,
    aten.native_batch_norm_backward.default: 1,
    aten.upsample_bilinear2d.default: 0,
    aten.upsample_nearest2d.default: 0,
    aten.upsample_nearest3d.default: 0,
    aten.upsample_trilinear3d.default: 0,
}
"""Operators whose first result has the memory format of an argument → its position."""


PYTHON_FAKES = {aten.constant_pad_nd.default}
"""Operators whose fake kernel in C++ does not take symbolic sizes."""

WANTS_NUMBERS = "expected to contain only concrete integers"
"""Part of the error of a fake kernel that calls another one in C++ with symbolic sizes."""

UNARY = ("lerp", "pow")
"""Operators with a separate kernel for Python numbers."""

COPIES = ("clone", "_to_copy", "convert_element_type")
"""Operators tagged pointwise whose memory format is an argument."""

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def static_fake_mode() -> FakeTensorMode:
    """Create a fake tensor mode with integer sizes and corrected strides.

    Without a shape environment torch also uses its native kernels for composite operators
    (upsample, dropout, matmul) instead of Python decompositions. So a trace contains the kernels
    that eager execution would run, and results are bit-equal.
    """
    return _Fakes(shape_env=None, allow_non_fake_inputs=True)


def fake_mode(environment: ShapeEnv) -> FakeTensorMode:
    """Create a fake tensor mode with symbolic sizes and corrected strides.

    Args:
        environment: has the symbols, each with an example. Strides are corrected as they are for
            the example.
    """
    return _Fakes(shape_env=environment, allow_non_fake_inputs=True)


class _Fakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    def dispatch(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result: Any = None
        if self.shape_env is not None:
            result = shaped_results(self, func, args, kwargs or {})
        if result is None:
            # A kernel in C++ that asks for integer sizes would fix symbolic ones.
            by_python = self.shape_env is not None and func in PYTHON_FAKES
            try:
                with enable_python_dispatcher() if by_python else nullcontext():
                    result = super().dispatch(func, types, args, kwargs or {})
            except RuntimeError as error:
                if self.shape_env is None or WANTS_NUMBERS not in str(error):
                    raise
                with enable_python_dispatcher():
                    result = super().dispatch(func, types, args, kwargs or {})
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if not isinstance(first, Tensor) or (1 not in first.shape and func not in SUGGESTED):
            return result
        if self.shape_env is None:
            strides = _kernel_strides(func, args, kwargs or {}, first.shape)
        else:
            strides = _symbolic_strides(func, args, kwargs or {}, first)
        if strides is None or strides == first.stride():
            return result
        with self:
            first = first.as_strided(first.shape, strides, first.storage_offset())
        return first if isinstance(result, Tensor) else (first, *result[1:])


def _kernel_strides(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], shape: torch.Size
) -> tuple[int, ...] | None:
    """Return the strides of an operator's first result if those of torch's fake may be wrong.

    Args:
        func: the operator.
        args: its arguments.
        kwargs: its keyword arguments.
        shape: of the first result.
    """
    if func in VIEWS:
        return _meta(args[0]).view(args[1]).stride()
    if func in DENSE:
        return _strides(shape, torch.contiguous_format)
    if func in SUGGESTED:
        return _suggested(func, args[SUGGESTED[func]], shape)
    if not isinstance(func, OpOverload) or func._schema.is_mutable:
        return None
    name = func.overloadpacket.__name__
    if name.endswith("_like") and kwargs.get("memory_format") in (None, torch.preserve_format):
        return _dense(args[0])
    if torch.Tag.pointwise in func.tags and name not in COPIES:
        return _iterated(func, name, args, shape)
    return None


def _symbolic_strides(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor
) -> tuple[Any, ...] | None:
    """`_kernel_strides` for symbolic sizes: the order of dimensions that the example has.

    Returns:
        Symbolic strides; None if torch's fake is right for the example, or the example's are not
        those of a dense tensor.
    """
    args, kwargs, sizes = pytree.tree_map_only(
        (Tensor, torch.SymInt), of_example, (list(args), kwargs, list(result.shape))
    )
    strides = _kernel_strides(func, args, kwargs, torch.Size(sizes))
    if strides is None or strides == tuple(map(of_example, result.stride())):
        return None
    return dense_strides(result.shape, strides)


def _iterated(
    func: OpOverload, name: str, args: Sequence[Any], shape: torch.Size
) -> tuple[int, ...] | None:
    """Return the strides that TensorIterator chooses for a pointwise result.

    TensorIterator treats a number as a tensor without dimensions, except in operators with a kernel
    for numbers. Such a tensor disables its fast paths.
    """
    operands = [x for x in args if isinstance(x, Tensor)]
    in_tensor_slots = [
        a for a, s in zip(args, func._schema.arguments, strict=False) if _is_tensor(s)
    ]
    full = [x for x in operands if x.ndim]
    numbers = len(in_tensor_slots) > len(full) or (
        "Scalar" in func._overloadname and name not in UNARY
    )
    if numbers and len(full) != 1:
        return None
    if numbers:
        return _meta(full[0]).mul(torch.empty((), device="meta")).stride()
    if any(x.shape != shape for x in operands):
        return None
    if all(x.is_contiguous() for x in operands):
        return _strides(shape, torch.contiguous_format)
    if len(shape) == 4 and all(x.is_contiguous(memory_format=CHANNELS_LAST[4]) for x in operands):
        return _strides(shape, CHANNELS_LAST[4])
    same = all(x.stride() == full[0].stride() for x in full[1:])
    return _dense(full[0]) if full and same else None


def _suggested(func: Any, tensor: Tensor, shape: torch.Size) -> tuple[int, ...] | None:
    """The strides of an argument's memory format, on the CPU; other devices have other kernels."""
    if tensor.device.type != "cpu":
        return None
    layout = suggest_memory_format(tensor)
    if func is aten.native_batch_norm.default:  # first checks whether its argument is dense
        for dense in (torch.contiguous_format, CHANNELS_LAST.get(tensor.ndim)):
            if dense is not None and tensor.is_contiguous(memory_format=dense):
                return _strides(shape, dense)
    return _strides(shape, layout)


def _is_tensor(argument: Any) -> bool:
    return str(argument.type) == "Tensor"


def _meta(tensor: Tensor) -> Tensor:
    """A meta tensor with the same metadata: torch's C++ code computes its views and copies."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _dense(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a copy: the tensor's own, if they are dense."""
    return _meta(tensor).clone().stride()


def _strides(shape: torch.Size, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=layout).stride()
