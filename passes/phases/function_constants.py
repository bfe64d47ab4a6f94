"""Write the constants that a custom autograd.Function creates into the stage's program.

A Function's code runs while a stage is traced. A tensor that it uses but that is not an argument
becomes a constant in the trace. If the tensor came from a closure (a parameter, a buffer, a
global), it may change between steps or require a gradient, so it is refused, and so is reading its
values. If the Function created it from numbers in its code, the stage's program creates it again.
The two can look the same in a trace (``torch.tensor([parameter, 1.0])`` copies a value), so a mode
intercepts calls of torch's functions while the stage is traced.
"""

from __future__ import annotations

from contextlib import nullcontext
from numbers import Number
from types import (
    BuiltinFunctionType,
    EllipsisType,
    MethodDescriptorType,
    NoneType,
    WrapperDescriptorType,
)
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError
from autopipe.passes._torch import is_traced, mark_recorded, traced_call
from autopipe.passes.graph import source_line
from autopipe.passes.ops import run_methods_under

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from autopipe.passes.ir import StageGraph

LARGEST = 64
"""The largest number of entries of a constant, so that it fits on a line of the program."""

DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
"""Dtypes whose values a Python literal expresses exactly."""

BUILTIN = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
"""Types of torch functions that run no Python code: `torch.tensor`, `new_tensor`, indexing."""

PLAIN = (Number, str, NoneType, EllipsisType, torch.dtype, torch.device, torch.layout)

READERS = {
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
    *("__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
}
"""Functions that return the values of a tensor as numbers of Python or NumPy."""

REMEDY = (
    "pass every tensor that a custom autograd.Function uses as an argument; it may create a"
    " constant from numbers in its own code: torch.tensor(0.5)"
)


class _ConstantWatch(TorchFunctionMode):
    """Marks nodes recorded by calls on plain numbers; refuses to read values of closures' tensors.

    A constant recorded with the mark was created from these numbers.
    """

    def __init__(self, stage: StageGraph) -> None:
        super().__init__()
        self.stage = stage

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READERS and any(isinstance(a, Tensor) and not is_traced(a) for a in args):
            raise _refused(self.stage, traced_call(), f"{name} of such a tensor")
        leaves = pytree.tree_leaves((args, kwargs))
        creates = isinstance(func, BUILTIN) and all(map(_is_plain_or_traced, leaves))
        with mark_recorded("created") if creates else nullcontext():
            return func(*args, **kwargs)


def watch_constants(stage: StageGraph) -> AbstractContextManager[None]:
    """While `stage` is traced: mark constants that a Function creates, unlike tensors of a closure.

    (A mode does not see calls inside a call that it has seen, so it is entered where the code of a
    Function begins.)

    Raises:
        CaptureError: the code reads the values of a tensor that is not an argument.
    """
    return run_methods_under(_ConstantWatch(stage))


def inline_constants(stage: StageGraph, traced: fx.GraphModule) -> None:
    """Replace the constants of a traced stage by ops that create them.

    Args:
        stage: what was traced; for source lines in errors.
        traced: its graph is changed in place and then has no constants.

    Raises:
        CaptureError: a tensor is not an argument of the Function that uses it, or a constant is too
            large to be written into the program.
    """
    graph = traced.graph
    for constant in [n for n in graph.nodes if n.op == "get_attr"]:
        for user in list(constant.users):
            if user.target is not torch.ops.aten.lift_fresh_copy.default or not _is_created(user):
                raise _refused(stage, _call(user), str(constant.target))
            numbers = _numbers(stage, user, getattr(traced, str(constant.target)))
            value = user.meta["val"]
            with graph.inserting_before(user):
                new = graph.call_function(
                    torch.tensor, (numbers,), {"dtype": value.dtype, "device": value.device}
                )
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        if not _is_created(constant):  # used, even if only for its shape
            raise _refused(stage, _call(constant), str(constant.target))
        graph.erase_node(constant)


def _numbers(stage: StageGraph, node: fx.Node, value: Tensor) -> Any:
    """Return a constant's values as (nested lists of) numbers."""
    problem = None
    if value.numel() > LARGEST:
        problem = "is too large to be written into the program"
    elif value.dtype not in DTYPES or value.layout is not torch.strided or value.is_meta:
        problem = "cannot be written into the program"
    else:
        numbers = value.tolist()
        again = torch.tensor(numbers, dtype=value.dtype, device=value.device)
        if again.shape == value.shape and again.stride() == value.stride():
            return numbers
        problem = "cannot be written into the program"
    raise CaptureError(
        f"a constant that a custom autograd.Function creates {problem}",
        source=_source(stage, _call(node)),
        expected=f"at most {LARGEST} numbers: integers, floats or booleans",
        found=f"{value.dtype} of shape {tuple(value.shape)}",
        remedy="create it with operators (torch.arange, torch.full), or register it as a buffer and"
        " pass it to the Function as an argument",
    )


def _is_plain_or_traced(argument: Any) -> bool:
    """Whether an argument is a plain value (a number, a dtype) or a tensor of the trace."""
    if isinstance(argument, Tensor):
        return is_traced(argument)
    if isinstance(argument, slice):
        return all(map(_is_plain_or_traced, (argument.start, argument.stop, argument.step)))
    return isinstance(argument, PLAIN)


def _is_created(node: fx.Node) -> bool:
    return bool(node.meta.get("custom", {}).get("created"))


def _call(node: fx.Node) -> int | None:
    """Return the position, in the stage graph, of the op that a traced node comes from."""
    position: int | None = node.meta.get("custom", {}).get("call")
    return position


def _source(stage: StageGraph, position: int | None) -> str | None:
    return None if position is None else source_line(list(stage.graph_module.graph.nodes)[position])


def _refused(stage: StageGraph, position: int | None, found: str) -> CaptureError:
    return CaptureError(
        "a custom autograd.Function uses a tensor that is not one of its arguments",
        source=_source(stage, position),
        found=found,
        remedy=REMEDY,
    )
