"""Replacements of private parts of torch while a model is traced, in the tracing thread only.

Beside `_torch` and `_torch_modes`, this is the only file that uses names of torch which start with
an underscore.
"""

from __future__ import annotations

import linecache
import logging
import sys
import weakref
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import decompositions
from torch._export.passes import replace_set_grad_with_hop_pass as regions
from torch._higher_order_ops import effects
from torch.amp.autocast_mode import _enter_autocast
from torch.export import _trace as export_trace
from torch.fx import graph_module
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules import transformer

from autopipe.errors import CaptureError
from autopipe.interrupts import raise_interrupt

from .one_at_a_time import replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@contextmanager
def free_trace_state() -> Iterator[None]:
    """On exit, free what torch's tracers keep of graphs: fake tensors, nodes and symbolic sizes.

    A `ShapeEnv` and what it keeps of fake tensors refer to each other, by way of C++, where
    Python's garbage collector does not look. And every cached method of the class keeps the object,
    some without a limit. A tracer at work elsewhere computes anew what was cached. The source of
    every `GraphModule` is kept for tracebacks; those of a trace never run.
    """
    created: list[weakref.ref[ShapeEnv]] = []
    create: Any = ShapeEnv.__init__

    def record(shapes: ShapeEnv, *args: Any, **kwargs: Any) -> None:
        created.append(weakref.ref(shapes))
        create(shapes, *args, **kwargs)

    loader: Any = graph_module._loader
    sources: list[str] = []
    keep = type(loader).cache

    def kept(self: Any, *args: Any, **kwargs: Any) -> str:
        name: str = keep(self, *args, **kwargs)
        sources.append(name)
        return name

    try:
        with replaced(ShapeEnv, "__init__", record), replaced(type(loader), "cache", kept):
            yield
    finally:
        for name in sources:
            if name.startswith("<eval_with_key>"):
                loader.eval_cache.pop(name, None)
                linecache.cache.pop(name, None)
        for shapes in filter(None, (ref() for ref in created)):
            if shapes.tracked_fakes is not None:
                shapes.tracked_fakes.clear()
            shapes.fake_tensor_cache.clear()
        for method in list(vars(ShapeEnv).values()):
            clear = getattr(method, "cache_clear", None)
            if clear is not None:
                clear()
        proxy_tensor._FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT.clear()


@contextmanager
def interruptible_traces() -> Iterator[None]:
    """Let Ctrl-C end what is traced or copied at the next node, where errors may arise as well."""
    create: Any = fx.Graph.create_node

    def create_node(graph: fx.Graph, *args: Any, **kwargs: Any) -> fx.Node:
        raise_interrupt()
        node: fx.Node = create(graph, *args, **kwargs)
        return node

    with replaced(fx.Graph, "create_node", create_node):
        yield


@contextmanager
def keep_no_grad_regions() -> Iterator[None]:
    """Let export respect `no_grad` inside an autocast region.

    Export cuts its graph where gradients are enabled or disabled, and tells by the first op of each
    piece which of the two it is. But a piece inside an autocast region begins with an op that
    enters the region again; this patch skips that op.
    """

    def switches(node: fx.Node, omit_if_same_with_ambient: bool = False) -> bool:
        if node.op != "call_module" or node.graph.owning_module is None:
            return False
        part: Any = node.graph.owning_module.get_submodule(str(node.target))
        calls = (n for n in part.graph.nodes if n.op != "placeholder")
        first = next((n for n in calls if n.target is not _enter_autocast), None)
        if first is None or first.target is not torch._C._set_grad_enabled:
            return False
        return not omit_if_same_with_ambient or first.args[0] != torch.is_grad_enabled()

    with replaced(regions, "_is_set_grad_enabled_sub_mod", switches):
        yield


@contextmanager
def fix_lstm_state_shapes() -> Iterator[None]:
    """Correct the shape of a fake LSTM's states (one dimension too many before torch 2.13)."""

    def corrected(layer: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, hidden: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
            out, states = layer(x, hidden, *args, **kwargs)
            pairs = zip(states, hidden, strict=True)
            return out, tuple(found.view(given.shape) for found, given in pairs)

        return run

    with ExitStack() as stack:
        if torch.__version__ < "2.13":
            for name in ("one_layer_lstm", "mkldnn_one_layer_lstm"):
                layer = corrected(getattr(decompositions, name))
                stack.enter_context(replaced(decompositions, name, layer))
        yield


@contextmanager
def take_masks_as_given() -> Iterator[None]:
    """Let `nn.TransformerEncoder` and `nn.TransformerDecoder` use every mask as it is.

    With ``is_causal=None`` they compare a mask's values with those of the causal mask, and if these
    are equal, tell their layers that a causal kernel may take its place. torch's layers compute the
    same with the mask itself, so no value is needed. A layer of the user's own may do anything with
    ``is_causal``: its model is refused.
    """

    def is_causal(
        mask: Tensor | None, is_causal: bool | None = None, size: int | None = None
    ) -> bool:
        if is_causal is not None or mask is None:
            return is_causal is True
        caller = sys._getframe(2)  # of `replaced`'s wrapper
        layers = getattr(caller.f_locals.get("self"), "layers", ())
        own = [type(m) for m in layers if not _is_torch_layer(m)]
        if own:
            raise CaptureError(
                f"{type(caller.f_locals['self']).__name__} tells its layers whether a mask is"
                " causal, which depends on the values of the mask",
                source=_written_at(own[0].forward),
                found=f"layers of a class of your own: {own[0].__name__}",
                remedy="say it in the call: is_causal=True or is_causal=False (tgt_is_causal for a"
                " decoder)",
            )
        return False

    with replaced(transformer, "_detect_is_causal_mask", is_causal):
        yield


def _written_at(function: Any) -> str:
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def _is_torch_layer(layer: object) -> bool:
    """Whether a layer computes the same with a causal mask as with the hint that it is one."""
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    attention = [getattr(layer, n, None) for n in ("self_attn", "multihead_attn")]
    return type(layer) in kinds and all(
        type(a) is nn.MultiheadAttention for a in attention if a is not None
    )


@contextmanager
def quiet_export() -> Iterator[None]:
    """Let torch's tracers print nothing in this thread; a failing one prints whole graphs."""

    def silent(*args: Any, **kwargs: Any) -> None:
        """Print nothing."""

    with replaced(export_trace, "print", silent), replaced(fx.graph_module, "print", silent):
        yield


@contextmanager
def silent_logs() -> Iterator[None]:
    """Let torch log nothing in this thread: fakes that fail are logged, and then done otherwise."""
    handle: Any = logging.Logger.callHandlers

    def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] != "torch":
            handle(logger, record)

    with replaced(logging.Logger, "callHandlers", call_handlers):
        yield


@contextmanager
def record_checks_unordered() -> Iterator[None]:
    """Record error checks of linear algebra (a singular matrix) like any other op.

    Newer torch versions order them by tokens, which exist only in AOTAutograd's own tracing.
    """
    ordered: Callable[[Any], bool] = effects.has_effects

    def has_effects(op: Any) -> bool:
        return op is not torch.ops.aten._linalg_check_errors.default and ordered(op)

    with replaced(effects, "has_effects", has_effects):
        yield
