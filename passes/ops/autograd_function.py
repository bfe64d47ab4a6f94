"""Custom autograd.Functions, kept whole through capture.

An exported graph has no backward, so a `Function` traced through would lose its own. While a model
is exported, `Function.apply` makes one call of the operator ``autopipe::function`` instead, which
the graph keeps. When a stage is traced with its gradients, that operator runs the real `apply`,
and autograd calls the user's backward.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)

apply: Any = torch.autograd.Function.apply


@dataclass
class _Site:
    """A kind of call: the class, its arguments (None for tensors), the structure of its result."""

    function: type[torch.autograd.Function]
    template: list[Any]
    positions: list[int]
    spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec | None = None

    def alike(self, other: _Site) -> bool:
        """Whether one number will do for both."""
        return (
            self.function is other.function
            and self.spec == other.spec
            and self.positions == other.positions
            and all(
                a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b)
                for a, b in zip(self.template, other.template, strict=True)
            )
        )


_watch: ContextVar[AbstractContextManager[Any] | None] = ContextVar("watch", default=None)

METHODS = ("forward", "setup_context", "backward", "vjp")


@contextmanager
def under(watch: AbstractContextManager[Any]) -> Iterator[None]:
    """The methods of Functions that are applied meanwhile run under `watch`, backward included."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def _watched(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The Function, whose methods run under what `under` was given, if it was."""
    watch = _watch.get()
    if watch is None:
        return function

    def method(original: Callable[..., Any]) -> Any:
        def run(*args: Any) -> Any:
            with watch:
                return original(*args)

        return staticmethod(run)

    own = [n for n in METHODS if getattr(function, n) is not getattr(torch.autograd.Function, n)]
    methods = {n: method(getattr(function, n)) for n in own}
    kind: Any = type(function)
    made: type[torch.autograd.Function] = kind(function.__name__, (function,), methods)
    return made


_SITES: list[_Site] = []
"""The calls met so far: an operator can name what is no tensor only by a number."""

_library = torch.library.Library("autopipe", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "function(Tensor[] tensors, int site) -> Tensor[]"
)


def _run(tensors: list[Tensor], site: int) -> list[Tensor]:
    known = _SITES[site]
    leaves = list(known.template)
    for position, tensor in zip(known.positions, tensors, strict=True):
        leaves[position] = tensor
    before = [t._version for t in tensors]
    function = _watched(known.function)
    results = apply.__func__(function, *pytree.tree_unflatten(leaves, known.spec))
    if [t._version for t in tensors] != before:
        raise _refused(known.function, "it changes an argument in place")
    found, known.out_spec = pytree.tree_flatten(results)
    if not all(isinstance(x, Tensor) for x in found):
        raise _refused(known.function, "it returns something else than tensors")
    return found


# Composite: the exporter keeps such a call whole, everything else runs through it.
_library.impl(  # type: ignore[no-untyped-call]
    "function", _run, "CompositeImplicitAutograd"
)


def record(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Stand in for ``function.apply(*args)`` while a model is exported.

    Raises:
        CaptureError: it changes an argument, or returns something else than tensors.
    """
    leaves, spec = pytree.tree_flatten(args)
    positions = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    template = [None if isinstance(x, Tensor) else x for x in leaves]
    site = _Site(function, template, positions, spec)
    number = next((i for i, known in enumerate(_SITES) if known.alike(site)), len(_SITES))
    if number == len(_SITES):
        _SITES.append(site)
    found = torch.ops.autopipe.function([leaves[i] for i in positions], number)
    out_spec = _SITES[number].out_spec
    assert out_spec is not None
    return pytree.tree_unflatten(found, out_spec)


def _refused(function: type, problem: str) -> CaptureError:
    return CaptureError(
        f"a custom autograd.Function cannot be captured: {problem}",
        found=f"{function.__module__}.{function.__qualname__}",
        remedy="let it return new tensors, and nothing else",
    )
