"""Private names of torch; `_torch_modes` and `_torch_patches` have the others.

Tested with torch 2.11 (CUDA 13.0) and torch 2.13 (CPU). If a new torch version breaks autopipe, fix
it there: no other file uses a name of torch that starts with an underscore.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch._ops import HigherOrderOperator, OpOverload
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols, free_unbacked_symbols
from torch.fx.traceback import (
    get_current_meta,
    has_preserved_node_meta,
    preserve_node_meta,
    set_stack_trace,
)
from torch.nn.modules._functions import BackwardHookFunction
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import (
    TorchDispatchMode,
)
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.flop_counter import flop_registry

from autopipe.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import sympy

__all__ = [
    "ASSERT",
    "PACK_PADDED",
    "READ_VERSION",
    "BackwardHookFunction",
    "BatchNormBase",
    "CheckpointFunction",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "ShapeEnv",
    "TorchDispatchMode",
    "emit_expression",
    "enable_python_dispatcher",
    "flop_registry",
    "free_symbols",
    "free_unbacked_symbols",
    "from_functional",
    "is_functorch_call",
    "is_mutable",
    "is_traced",
    "lazy_graph_code",
    "make_fx",
    "mark_recorded",
    "min_cut_saved",
    "parametrization_cache",
    "preserve_node_meta",
    "set_traced_call",
    "size_text",
    "storage_id",
    "storage_id_of",
    "suggest_memory_format",
    "symbolic_fake_mode",
    "to_functional",
    "traced_call",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
]


ASSERT: Any = torch._assert
PACK_PADDED: Any = torch._VF._pack_padded_sequence
"""What `pack_padded_sequence` ends in."""

READ_VERSION: Any = torch.Tensor._version.__get__  # type: ignore[attr-defined]
"""What a `TorchFunctionMode` sees where code reads how often a tensor was changed in place."""


@contextmanager
def lazy_graph_code() -> Iterator[None]:
    """Within this context, torch's graph modules generate their Python code only when they run.

    The passes read graph modules and run none of them; this saves a tenth of the compile time.
    """
    with _use_lazy_graph_module(True):
        yield


def symbolic_fake_mode() -> FakeTensorMode:
    """Create a fake tensor mode in which torch.export can make sizes symbolic."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def parametrization_cache() -> dict[Any, Any]:
    """Return what `torch.nn.utils.parametrize.cached` has cached."""
    cache: dict[Any, Any] = parametrize._cache
    return cache


def is_functorch_call(target: Any) -> bool:
    """Whether an exported op belongs to a function transform, such as vmap's levels."""
    return str(getattr(target, "__module__", "")).startswith("torch._functorch.")


def is_mutable(op: OpOverload) -> bool:
    """Whether an operator writes to an argument."""
    return bool(op._schema.is_mutable)


def set_traced_call(call: int, stack_trace: str | None) -> None:
    """While tracing: attribute the following nodes to the op at a position of the traced graph."""
    if has_preserved_node_meta():
        get_current_meta()["custom"] = {"call": call}
        set_stack_trace([stack_trace] if stack_trace else [])


def traced_call() -> int | None:
    """While tracing: return the position set by `set_traced_call`."""
    position: int | None = get_current_meta().get("custom", {}).get("call")
    return position


@contextmanager
def mark_recorded(fact: str) -> Iterator[None]:
    """While tracing: set ``meta["custom"][fact]`` of every node recorded within this."""
    meta = get_current_meta()
    before = meta.get("custom", {})
    meta["custom"] = {**before, fact: True}
    try:
        yield
    finally:
        meta["custom"] = before


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a trace, and so has no values."""
    return isinstance(tensor, (FunctionalTensor, FakeTensor))


def to_functional(tensor: Tensor) -> Tensor:
    """Wrap a tensor for `FunctionalTensorMode`: in-place operators and views become pure."""
    return FunctionalTensor.to_functional(tensor)


def from_functional(tensor: Tensor) -> Tensor:
    """Unwrap a functional tensor, with every pending in-place update applied."""
    if not isinstance(tensor, FunctionalTensor):
        return tensor
    torch._sync(tensor)  # type: ignore[no-untyped-call, attr-defined]
    return torch._from_functional_tensor(tensor.elem)


def storage_id(tensor: Tensor) -> int:
    """Return the identity of the memory of a (fake or real) tensor; equal for aliases."""
    return int(tensor.untyped_storage()._cdata)


def storage_id_of(node: fx.Node) -> int | None:
    """Return the `storage_id` of the (fake) tensor that `node` computes; None for a non-tensor."""
    value = node.meta.get("val")
    return storage_id(value) if isinstance(value, Tensor) else None


def min_cut_saved(
    joint: fx.GraphModule, inputs: Sequence[Any], forward_outputs: int, budget: float = 1.0
) -> set[str]:
    """Ask functorch's min-cut partitioner which values to save from forward to backward.

    Args:
        joint: joint graph; its placeholders are named ``primals_*`` and ``tangents_*``.
        inputs: the fake tensors that it was traced with.
        forward_outputs: how many of its outputs, from the left, belong to the forward.
        budget: fraction, from 0 to 1, of the bytes that it would save beyond the inputs.

    Returns:
        Names of the saved values.
    """
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
    partition = min_cut_rematerialization_partition
    with functorch_config.patch(activation_memory_budget=budget):
        forward, _ = partition(joint, list(inputs), num_fwd_outputs=forward_outputs)
    output = next(node for node in forward.graph.nodes if node.op == "output")
    saved = output.args[0][forward_outputs:]
    return {node.name for node in saved if isinstance(node, fx.Node)}


class _BuiltinsPrinter(PythonPrinter):
    """Writes with builtins of Python what torch's printer writes with `math` and `torch.sym_*`."""

    def _print_ToFloat(self, expr: sympy.Expr) -> str:  # noqa: N802 (sympy looks for it)
        return f"float({self._print(expr.args[0])})"

    def _print_TruncToInt(self, expr: sympy.Expr) -> str:  # noqa: N802 (sympy looks for it)
        return f"int({self._print(expr.args[0])})"

    def _print_FloorToInt(self, expr: sympy.Expr) -> str:  # noqa: N802 (sympy looks for it)
        return f"int(({self._print(expr.args[0])}) // 1)"

    def _print_CeilToInt(self, expr: sympy.Expr) -> str:  # noqa: N802 (sympy looks for it)
        return f"(0 - int((0 - ({self._print(expr.args[0])})) // 1))"

    _print_floor, _print_ceiling = _print_FloorToInt, _print_CeilToInt


def size_text(expr: sympy.Expr) -> str:
    """Write a number or condition that is computed from sizes as Python, with builtins only.

    Raises:
        NotImplementedError: it uses another function: a square root, a sine.
    """
    text: str = _BuiltinsPrinter().doprint(expr)
    if any(part in text for part in ("math.", "torch.", " if ")):
        raise NotImplementedError(f"a number computed from sizes by a function: {text}")
    return text


class _OnProxies(PythonReferenceAnalysis):
    """Evaluates size expressions on proxies; torch's rule for 1 / n would read numbers."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    @staticmethod
    def floor_to_int(x: Any, dtype: Any) -> Any:
        return _call(math.floor, x)

    @staticmethod
    def ceil_to_int(x: Any, dtype: Any) -> Any:
        return _call(math.ceil, x)

    @staticmethod
    def trunc_to_int(x: Any, dtype: Any) -> Any:
        return _call(math.trunc, x)

    @staticmethod
    def round_to_int(x: Any, dtype: Any) -> Any:
        return _call(round, x)


def _call(function: Callable[..., Any], proxy: fx.Proxy) -> fx.Proxy:
    found: fx.Proxy = proxy.tracer.create_proxy("call_function", function, (proxy,), {})
    return found


def emit_expression(expr: sympy.Expr, values: Mapping[Any, fx.Node]) -> fx.Node:
    """Append the arithmetic of a size expression to a graph.

    Args:
        expr: depends on at least one symbol.
        values: for each of its symbols the node whose value is the symbol's.

    Returns:
        The node whose value is `expr`.

    Raises:
        UnsupportedError: it calls a function besides arithmetic and rounding.
    """
    if expr.is_Symbol:
        return values[expr]
    proxies = {symbol: fx.Proxy(node) for symbol, node in values.items()}
    try:
        result: fx.Proxy = sympy_interp(_OnProxies, proxies, expr)
    except (TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise UnsupportedError(
            "a size is computed by a function that a stage cannot call", found=str(expr)
        ) from error
    return result.node
