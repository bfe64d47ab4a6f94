"""Count the FLOPs and bytes of dispatched kernels; fit polynomials in `B` to the counts.

FLOPs follow torch's own formulas (`torch.utils.flop_counter`). Bytes are one read of every argument
and one write of every result of each kernel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.passes._torch import TorchDispatchMode, flop_registry, storage_id
from autopipe.passes.ir import B

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROBE_BATCHES = (2, 3, 5)
"""Batch sizes at which an op is run and counted."""

EXTRA_PROBE = 7
"""A fourth batch size, used where the counts at those three are not on a line."""


class OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts every dispatched kernel.

    Attributes:
        flops: by the formulas of `torch.utils.flop_counter.FlopCounterMode`; multiply and add count
            as two.
        moved_bytes: one read of every argument and one write of every result; 0 for views.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.flops += counted_flops(func, args, kwargs, result)
        read, written = _tensors((args, kwargs)), _tensors(result)
        if touches_memory(func, read, written):
            self.moved_bytes += sum(map(distinct_bytes, [*read, *written]))
        return result


def counted_flops(target: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Count the FLOPs of an operator by torch's formula; 0 if it has none.

    Args:
        target: the operator, or another function.
        args, kwargs: its arguments.
        result: what it returned.
    """
    packet: Any = getattr(target, "overloadpacket", None)
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    if packet.__name__.startswith("_scaled_dot_product"):
        args = _with_all_heads(args, 1 if packet.__name__.endswith("_backward") else 0)
    return int(formula(*args, **kwargs, out_val=result))


def _with_all_heads(args: Sequence[Any], first: int) -> Sequence[Any]:
    """The arguments of attention with a key and a value for each query; the query is the `first`.

    Before torch 2.13 the formulas knew no grouped queries. (They read shapes only.)
    """
    heads = args[first].shape[1]
    if args[first + 1].shape[1] == heads:
        return args
    full = (
        torch.empty((x.shape[0], heads, *x.shape[2:]), dtype=x.dtype, device="meta")
        for x in args[first + 1 : first + 3]
    )
    return (*args[: first + 1], *full, *args[first + 3 :])


def touches_memory(target: Any, read: Sequence[Tensor], written: Sequence[Tensor]) -> bool:
    """Whether an op reads or writes memory; creating views or empty tensors does not.

    Args:
        target: the operator; None for any other function.
        read: tensors among its arguments.
        written: tensors among its results.
    """
    owned = {storage_id(t) for t in read}
    is_view = written and all(storage_id(t) in owned for t in written)
    allocates = target is not None and target._overloadpacket.__name__.startswith(
        ("empty", "new_empty")
    )
    return not allocates and (not is_view or (target is not None and target._schema.is_mutable))


def work_kind(target: Any, flops: Any) -> str:
    """Classify an operator's work.

    Args:
        target: the operator.
        flops: its FLOPs, a number or an expression in `B`.

    Returns:
        One of `autopipe.passes.devices.KINDS`.
    """
    name = str(target)
    if flops == 0:
        return "memory"
    if "attention" in name:
        return "attention"
    return "convolution" if "conv" in name else "matmul"


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


def distinct_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; those that `expand` repeats count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n for n, stride in sizes if stride or not n) * tensor.dtype.itemsize


def fit_polynomial(count: Callable[[int], int]) -> sympy.Expr:
    """Return the polynomial in `B` through a few counts.

    Args:
        count: a count (FLOPs, bytes) as a function of the batch size.
    """
    (x, u), (y, v), (z, w) = points = [(batch, count(batch)) for batch in PROBE_BATCHES]
    if u == v == w:
        return sympy.Integer(u)
    slope, rest = divmod(v - u, y - x)
    if rest == 0 and w - u == slope * (z - x):
        return slope * B + (u - slope * x)
    return sympy.expand(sympy.interpolate([*points, (EXTRA_PROBE, count(EXTRA_PROBE))], B))
