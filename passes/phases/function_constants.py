"""Constants inside a custom autograd.Function: which of them a stage's program makes anew.

A Function's code runs while a stage is traced, and a tensor that it did not get as an argument ends
in the trace as a constant. One that came by closure (a parameter, a buffer, a global) may change
from step to step, and may want a gradient: it is refused, and so is reading its values. One that
was made there, of numbers in the code, is made again by the stage's program. In a trace the two may
look alike (``torch.tensor([parameter, 1.0])`` copies a value), so the calls of torch's
functions are watched.
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
from autopipe.passes.ops import under

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from autopipe.passes.ir import StageGraph

LARGEST = 64
"""How many numbers a constant may have: as many as a line of the program can show."""

DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
"""What Python's numbers express exactly, in text too."""

BUILTIN = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
"""Functions of torch that run no Python code: `torch.tensor`, `new_tensor`, an index."""

PLAIN = (Number, str, NoneType, EllipsisType, torch.dtype, torch.device, torch.layout)

READERS = {
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
    *("__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
}
"""Functions of tensors whose results are numbers of Python's or NumPy's."""

REMEDY = (
    "give a custom autograd.Function every tensor that it uses as an argument; a constant may be"
    " made in it, of numbers that stand there: torch.tensor(0.5)"
)


class _Watch(TorchFunctionMode):
    """Marks what is recorded of calls that are given numbers; lets no closure be read.

    A constant that is recorded under the mark was made by the call, of these numbers.
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
        given = pytree.tree_leaves((args, kwargs))
        made = isinstance(func, BUILTIN) and all(map(_is_known, given))
        with mark_recorded("made") if made else nullcontext():
            return func(*args, **kwargs)


def watch_constants(stage: StageGraph) -> AbstractContextManager[None]:
    """While `stage` is traced: tell constants that are made from those that are brought along.

    (A mode sees nothing of what is called within a call that it has seen, so it is entered where
    the code of a Function begins.)

    Raises:
        CaptureError: the values of a tensor that is no argument are read.
    """
    return under(_Watch(stage))


def inline_constants(stage: StageGraph, traced: fx.GraphModule) -> None:
    """Let a traced stage make its constants itself; changes its graph, which then has none.

    Raises:
        CaptureError: a tensor came in by another way than the stage's arguments, or is too large to
            be written down.
    """
    graph = traced.graph
    for held in [n for n in graph.nodes if n.op == "get_attr"]:
        for user in list(held.users):
            if user.target is not torch.ops.aten.lift_fresh_copy.default or not _made(user):
                raise _refused(stage, _call(user), str(held.target))
            numbers = _numbers(stage, user, getattr(traced, str(held.target)))
            looks = user.meta["val"]
            with graph.inserting_before(user):
                new = graph.call_function(
                    torch.tensor, (numbers,), {"dtype": looks.dtype, "device": looks.device}
                )
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        if not _made(held):  # touched, even if only for its shape
            raise _refused(stage, _call(held), str(held.target))
        graph.erase_node(held)


def _numbers(stage: StageGraph, node: fx.Node, value: Tensor) -> Any:
    """A constant's values as (lists of) numbers, from which it can be made again."""
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
        f"a constant that a custom autograd.Function makes {problem}",
        source=_source(stage, _call(node)),
        expected=f"at most {LARGEST} numbers: integers, floats or booleans",
        found=f"{value.dtype} of shape {tuple(value.shape)}",
        remedy="make it with operators (torch.arange, torch.full), or register it as a buffer and"
        " give it to the Function as an argument",
    )


def _is_known(argument: Any) -> bool:
    """Nothing that a tensor of other values could come from: numbers, or a part of the trace."""
    if isinstance(argument, Tensor):
        return is_traced(argument)
    if isinstance(argument, slice):
        return all(map(_is_known, (argument.start, argument.stop, argument.step)))
    return isinstance(argument, PLAIN)


def _made(node: fx.Node) -> bool:
    return bool(node.meta.get("custom", {}).get("made"))


def _call(node: fx.Node) -> int | None:
    """Position, in the stage graph, of the call that a traced node comes from."""
    position: int | None = node.meta.get("custom", {}).get("call")
    return position


def _source(stage: StageGraph, position: int | None) -> str | None:
    return None if position is None else source_line(list(stage.graph_module.graph.nodes)[position])


def _refused(stage: StageGraph, position: int | None, found: str) -> CaptureError:
    return CaptureError(
        "a tensor is used that was not given as an argument",
        source=_source(stage, position),
        found=found,
        remedy=REMEDY,
    )
