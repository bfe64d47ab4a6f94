"""Tensors without values, laid out as the kernels would lay them out.

torch knows the result of most operators without running them, shapes and types always, strides not
quite: where a dimension has one entry it often gives another stride than the kernel does, as if it
did not matter. It does. An upsampling, a norm or a convolution chooses the memory format of its
result by *all* strides of its argument (`suggest_memory_format`), so one wrong stride of a batch of
one sample turns into a result with another order of dimensions; and by that order a product chooses
its kernel, `contiguous` whether it copies, and `view` whether it can be done at all.

Mended here is what real models meet: views, pointwise arithmetic, tensors made like another one,
norms, upsampling. Known to differ still are flip, roll, index, tril, glu, prelu, hardswish's
backward and reflection padding. A stage therefore takes what another one sends as it is, whatever
strides it was traced with; so a cut changes nothing, and what is left is a trace's own decisions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipe.passes._torch import FakeTensorMode, OpOverload, suggest_memory_format

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
"""Operators whose first result is contiguous, whatever its argument is."""

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
"""Operators whose first result is in the memory format of an argument, and which."""


UNARY = ("lerp", "pow")
"""Operators with a kernel for numbers."""

COPIES = ("clone", "_to_copy", "convert_element_type")
"""Operators that count as pointwise, and lay their result out as they are told."""

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def static_fake_mode() -> FakeTensorMode:
    """A fake tensor mode without symbolic sizes: shapes are plain integers.

    Without a shape environment torch also keeps its native kernels for composite operators
    (upsample, dropout, matmul) instead of Python decompositions, so that what is traced is what
    eager would run, to the bit.
    """
    return _StaticFakes(shape_env=None, allow_non_fake_inputs=True)


class _StaticFakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    def dispatch(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result: Any = super().dispatch(func, types, args, kwargs or {})
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if not isinstance(first, Tensor) or (1 not in first.shape and func not in SUGGESTED):
            return result
        strides = _kernel_strides(func, args, kwargs or {}, first.shape)
        if strides is None or strides == first.stride():
            return result
        with self:
            first = first.as_strided(first.shape, strides, first.storage_offset())
        return first if isinstance(result, Tensor) else (first, *result[1:])


def _kernel_strides(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], shape: torch.Size
) -> tuple[int, ...] | None:
    """The strides of an operator's first result, where torch is known to be wrong about them.

    Args:
        func: the operator.
        args: its arguments.
        kwargs: likewise.
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


def _iterated(
    func: OpOverload, name: str, args: Sequence[Any], shape: torch.Size
) -> tuple[int, ...] | None:
    """What TensorIterator does, where numbers keep it from its short cuts, and where they do not.

    A number is a tensor without dimensions to it, but for operators with a kernel for numbers.
    """
    operands = [x for x in args if isinstance(x, Tensor)]
    places = [a for a, s in zip(args, func._schema.arguments, strict=False) if _is_tensor(s)]
    full = [x for x in operands if x.ndim]
    numbers = len(places) > len(full) or ("Scalar" in func._overloadname and name not in UNARY)
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
    """On the CPU; elsewhere torch has other kernels."""
    if tensor.device.type != "cpu":
        return None
    layout = suggest_memory_format(tensor)
    if func is aten.native_batch_norm.default:  # looks whether it is dense before it asks
        for dense in (torch.contiguous_format, CHANNELS_LAST.get(tensor.ndim)):
            if dense is not None and tensor.is_contiguous(memory_format=dense):
                return _strides(shape, dense)
    return _strides(shape, layout)


def _is_tensor(argument: Any) -> bool:
    return str(argument.type) == "Tensor"


def _meta(tensor: Tensor) -> Tensor:
    """A tensor that looks so, whose views and copies are those of torch's C++ operators."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _dense(tensor: Tensor) -> tuple[int, ...]:
    """Of a copy of it: its own, if they are dense."""
    return _meta(tensor).clone().stride()


def _strides(shape: torch.Size, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=layout).stride()
