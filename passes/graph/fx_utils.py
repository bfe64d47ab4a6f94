"""Tensors, side effects and views of fx nodes; appending ops; caches by graph."""

from __future__ import annotations

import functools
import operator
import re
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .source_location import is_user_file

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten


def source_line(node: fx.Node) -> str | None:
    """Return ``file:line`` of the op in the model that a node comes from, or None."""
    frames = re.findall(r'(?m)^\s*File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    users = [f"{file}:{line}" for file, line in frames if is_user_file(file)]
    return users[-1] if users else None


def is_random(node: fx.Node) -> bool:
    """Whether an op draws random numbers.

    An operator is random if its overload has torch's tag `nondeterministic_seeded`, so a new random
    operator needs no entry anywhere. The exception is a dropout of torch that drops nothing. An
    operator of another library may draw regardless of its `p` or `train`.
    """
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    if torch.Tag.nondeterministic_seeded not in tags or schema is None:
        return False
    if not schema.name.startswith("aten::"):
        return True
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values |= dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    probability = next((values[n] for n in ("p", "dropout_p", "dropout") if n in values), None)
    return values.get("train") is not False and probability != 0.0


def has_side_effect(node: fx.Node) -> bool:
    """Whether an op writes to an argument, so that it matters even if its result is unused."""
    schema = getattr(node.target, "_schema", None)
    return (schema is not None and schema.is_mutable) or node.target in HIDDEN_WRITES


HIDDEN_WRITES = {  # operator → (positions written, position of the flag that makes it write)
    aten.batch_norm.default: ((3, 4), 5),
    aten.native_batch_norm.default: ((3, 4), 5),
    aten.cudnn_batch_norm.default: ((3, 4), 5),
    aten.miopen_batch_norm.default: ((3, 4), 5),
    aten.instance_norm.default: ((3, 4), 5),
}
"""Operators that write to arguments (running statistics) although their schemas do not say so."""


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of an op that it changes in place."""
    if node.target in HIDDEN_WRITES:
        positions, flag = HIDDEN_WRITES[node.target]
        written = [node.args[p] for p in positions] if node.args[flag] else []
    elif has_side_effect(node):
        arguments = node.target._schema.arguments  # type: ignore[union-attr]
        written = [
            node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
            for i, a in enumerate(arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
    else:
        written = []
    flat = pytree.tree_leaves(written)
    return [a for a in flat if isinstance(a, fx.Node)]


def view_base(node: fx.Node) -> fx.Node | None:
    """Return the node that an op's result is a view of (or is itself); None if it is no view.

    If the operator's schema says that a result aliases an argument, that is the first argument.
    """
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
    if not shares and node.target is not operator.getitem:
        return None
    return next((n for n in node.all_input_nodes if not is_size(n)), None)


def memory_owner(node: fx.Node) -> fx.Node:
    """Return the op or placeholder that allocated the memory of a value."""
    while (source := view_base(node)) is not None:
        node = source
    return node


def memory_owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return the `memory_owner` of every node, in one walk."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = view_base(node)
        owner[node] = node if source is None else owner[source]
    return owner


def remove_dead_calls(graph: fx.Graph) -> None:
    """Erase the ops whose results are unused and that have no side effect.

    (fx's own dead code elimination keeps random ops. Here a draw does not depend on other draws.)
    """
    for node in reversed(graph.nodes):
        if (
            node.op in ("call_function", "call_method")
            and not node.users
            and not has_side_effect(node)
        ):
            graph.erase_node(node)


def tensors_of(node: fx.Node) -> list[Tensor]:
    """Return the (fake) tensors that a node computes: one, several, or none for a size."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [v for v in value if isinstance(v, Tensor)]
    return [value] if isinstance(value, Tensor) else []


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a number from shapes, not a tensor."""
    numbers = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(node.meta.get("val"), numbers)


def is_integer(node: fx.Node) -> bool:
    """Whether a node computes tensors of integers (not booleans): indices, counts."""
    dtypes = [t.dtype for t in tensors_of(node)]
    return bool(dtypes) and not any(
        d.is_floating_point or d.is_complex or d is torch.bool for d in dtypes
    )


OTHER_NAMES = {
    aten.zero_.default: aten.zeros_like.default,  # aten.zero has no derivative
    aten.normal_.default: aten.normal_functional.default,
}
"""In-place operator → functional variant, if it does not follow from the name."""


def functional_variant(target: Any) -> Any:
    """Find the overload that computes the same and writes to no argument, or None.

    ``add`` for ``add_``, ``div`` for ``div(out=)``.
    """
    if target in OTHER_NAMES:
        return OTHER_NAMES[target]
    schema = target._schema
    name = schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else target.overloadpacket
    wanted = [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)._schema
        writes = found.is_mutable or any(r.alias_info is not None for r in found.returns)
        if not writes and [(a.name, str(a.type)) for a in found.arguments] == wanted:
            return getattr(packet, overload)
    return None


def add_call(graph: fx.Graph, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> fx.Node:
    """Append an op to a captured graph, with its metadata computed by running it on fake tensors.

    Args:
        graph: the graph.
        target: the operator.
        args: nodes and constants; at least one node with a tensor.
        kwargs: likewise.
    """
    node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    fake: Any = next(t for n in node.all_input_nodes for t in tensors_of(n))
    with fake.fake_mode:
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    for source in node.all_input_nodes:
        if "stack_trace" in source.meta:
            node.meta["stack_trace"] = source.meta["stack_trace"]
    return node


class _HasGraph(Protocol):
    @property
    def graph(self) -> fx.Graph: ...


Holder = TypeVar("Holder", bound=_HasGraph)
Result = TypeVar("Result")


def cache_per_graph(function: Callable[[Holder], Result]) -> Callable[[Holder], Result]:
    """Cache a function's result by the `graph` of its argument, for as long as the graph is alive.

    Only for a function of the graph alone: identical stages share their graph. The result must not
    contain nodes of the graph, which would keep it alive.
    """
    results: WeakKeyDictionary[fx.Graph, Result] = WeakKeyDictionary()

    @functools.wraps(function)
    def cached(holder: Holder) -> Result:
        if holder.graph not in results:
            results[holder.graph] = function(holder)
        return results[holder.graph]

    return cached
