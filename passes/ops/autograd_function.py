"""Capture each custom autograd.Function as one op, with the user's own backward.

An exported graph has no backward, so tracing into a `Function` would lose its custom backward.
While a model is exported, `Function.apply` becomes one op in the graph, ``autopipe::function``.
When a stage is traced with its gradients, that op runs the real `apply`, and autograd calls the
user's backward.
"""

from __future__ import annotations

import itertools
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

PLAIN_TYPES = (int, float, bool, str, type(None), torch.dtype, torch.device)

APPLY_OWNER: Any = torch.autograd.Function.__base__
"""The class in which a trace replaces `apply`: `Function.apply` ends in that of its base.

(``round = Round.apply``, evaluated before the trace, keeps `Function`'s own method.)"""


@dataclass
class _FunctionCall:
    """A kind of call of a Function.

    Attributes:
        function: its class.
        template: the flattened arguments; None for tensors.
        positions: the positions of tensors among them.
        spec: structure of the arguments.
        out_spec: structure of the result; None before the first run.
    """

    function: type[torch.autograd.Function]
    template: list[Any]
    positions: list[int]
    spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec | None = None

    def is_like(self, other: _FunctionCall) -> bool:
        """Whether the two calls differ only in their tensors."""
        return (
            self.function is other.function
            and self.spec == other.spec
            and self.positions == other.positions
            and all(
                a is b or (type(a) is type(b) and isinstance(a, PLAIN_TYPES) and a == b)
                for a, b in zip(self.template, other.template, strict=True)
            )
        )


_method_context: ContextVar[AbstractContextManager[Any] | None] = ContextVar(
    "method_context", default=None
)

METHODS = ("forward", "setup_context", "backward", "vjp")
"""The methods of a Function that users write."""


@contextmanager
def run_methods_under(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Run the methods of Functions within a context, their backward included.

    Args:
        context: entered around each method of every Function that is applied before this exits.
    """
    token = _method_context.set(context)
    try:
        yield
    finally:
        _method_context.reset(token)


def _with_context(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The Function itself, or a subclass whose methods run within `run_methods_under`'s context."""
    context = _method_context.get()
    if context is None:
        return function

    def method(original: Callable[..., Any]) -> Any:
        def run(*args: Any) -> Any:
            with context:
                return original(*args)

        return staticmethod(run)

    own = [n for n in METHODS if getattr(function, n) is not getattr(torch.autograd.Function, n)]
    methods = {n: method(getattr(function, n)) for n in own}
    kind: Any = type(function)
    subclass: type[torch.autograd.Function] = kind(function.__name__, (function,), methods)
    return subclass


_CALLS: weakref.WeakValueDictionary[int, _FunctionCall] = weakref.WeakValueDictionary()
"""The kinds of calls in living graphs. An op's arguments are tensors and numbers: it has the key.

(A call holds the Function's arguments, which may refer to a whole model.)
"""
_sites = itertools.count()

_recorded: ContextVar[dict[int, _FunctionCall]] = ContextVar("recorded")


@contextmanager
def recorded_functions() -> Iterator[Mapping[int, object]]:
    """Collect the calls that `record_function` records until exit.

    Yields:
        A mapping that whoever keeps the graph must keep: without it, its ops cannot run.
    """
    found: dict[int, _FunctionCall] = {}
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


_library = torch.library.Library("autopipe", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "function(Tensor[] tensors, int site) -> Tensor[]"
)


def _run(tensors: list[Tensor], site: int) -> list[Tensor]:
    call = _CALLS.get(site)
    if call is None:
        raise CaptureError(
            "a custom autograd.Function of a graph whose pipeline is gone",
            remedy="keep the pipeline for as long as the graphs of its stages run",
        )
    leaves = list(call.template)
    for position, tensor in zip(call.positions, tensors, strict=True):
        leaves[position] = tensor
    versions = [t._version for t in tensors]
    function = _with_context(call.function)
    results = apply_function(function, *pytree.tree_unflatten(leaves, call.spec))
    if [t._version for t in tensors] != versions:
        raise _error(call.function, "it changes an argument in place")
    found, call.out_spec = pytree.tree_flatten(results)
    if not all(isinstance(x, Tensor) for x in found):
        raise _error(call.function, "it returns something other than tensors")
    return found


# Composite: the exporter keeps the op as it is; everything else runs its implementation.
_library.impl(  # type: ignore[no-untyped-call]
    "function", _run, "CompositeImplicitAutograd"
)


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call torch's own ``function.apply(*args)``, even while a model is exported.

    Args:
        function: a custom autograd.Function.
        args: its arguments, those with a default among them.
    """
    return super(APPLY_OWNER, function).apply(*args)


def record_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Replace ``function.apply(*args)`` by one op, ``autopipe::function``.

    Args:
        function: a custom autograd.Function.
        args: its arguments.

    Returns:
        What `apply` returns.

    It must be called within `recorded_functions`.

    Raises:
        CaptureError: it changes an argument, or returns something other than tensors.
    """
    leaves, spec = pytree.tree_flatten(args)
    positions = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    template = [None if isinstance(x, Tensor) else x for x in leaves]
    call = _FunctionCall(function, template, positions, spec)
    alike = ((i, known) for i, known in list(_CALLS.items()) if known.is_like(call))
    site, call = next(alike, (next(_sites), call))
    _CALLS[site] = _recorded.get()[site] = call
    found = torch.ops.autopipe.function([leaves[i] for i in positions], site)
    assert call.out_spec is not None
    return pytree.tree_unflatten(found, call.out_spec)


def _error(function: type, problem: str) -> CaptureError:
    return CaptureError(
        f"a custom autograd.Function cannot be captured: {problem}",
        found=f"{function.__module__}.{function.__qualname__}",
        remedy="let it return new tensors, and nothing else",
    )
