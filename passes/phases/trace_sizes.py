"""The sizes of one trace: numbers, or symbols with the conditions under which the trace holds.

torch works out much about symbolic sizes in each trace: the shape of every result, what is
contiguous. The stages of a model are much alike, so their traces share the symbols, and what is
known about them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import sympy
import torch

from autopipe.passes._torch import ShapeEnv
from autopipe.passes._torch_sizes import create_size_symbol, remembered_sizes, size_of_expression
from autopipe.passes.graph import (
    SizeNames,
    fake_mode,
    in_named_sizes,
    name_sizes,
    static_fake_mode,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from autopipe.passes._torch import FakeTensorMode
    from autopipe.passes.ir import Sizes

    from .metadata import TensorMeta


class SharedSymbols:
    """Symbols that several traces have in common, as long as none of them fixes a size.

    A trace then holds under the conditions of all traces before it, too.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, _Symbols] = {}

    def of(self, example: Sizes) -> _Symbols:
        """Return symbols with these values, those of earlier traces if possible."""
        key = tuple(example.items())
        found = self._known.get(key)
        if found is None or found.environment.replacements:
            found = self._known[key] = _Symbols(example)
        return found


class _Symbols:
    """Symbols of torch for the sizes of an example.

    Attributes:
        environment: where torch keeps what it knows of them.
        own: size → its symbol in the environment.
        sizes: expression → what stands for it in shapes.
        memory: see `remembered_sizes`.
    """

    def __init__(self, example: Sizes) -> None:
        self.environment = ShapeEnv()
        self.own: dict[Any, Any] = {}
        self.sizes: dict[Any, Any] = {}
        self.memory: dict[Any, Any] = {}
        for size, n in example.items():
            self.own[size], self.sizes[size] = create_size_symbol(self.environment, str(size), n)
        names = {own: size for size, own in self.own.items()}
        name_sizes(self.environment, SizeNames(names, {}))


class TraceSizes:
    """The sizes of one trace.

    Args:
        metas: of the tensors that are traced.
        example: the values of all symbols in them.
        shared: with which other traces the symbols are shared.
    """

    def __init__(
        self, metas: Iterable[TensorMeta], example: Sizes, shared: SharedSymbols | None = None
    ) -> None:
        symbols: set[Any] = set()
        for meta in metas:
            for n in meta.shape:
                symbols |= n.free_symbols if isinstance(n, sympy.Basic) else set()
        self._example = {s: example[s] for s in sorted(symbols, key=str)}
        self._symbols = (shared or SharedSymbols()).of(self._example) if symbols else None

    def fake_mode(self) -> FakeTensorMode:
        """Create the mode to trace in."""
        return static_fake_mode() if self._symbols is None else fake_mode(self._symbols.environment)

    def remembered(self) -> AbstractContextManager[None]:
        """While tracing: compute each operation on sizes once."""
        if self._symbols is None:
            return nullcontext()
        return remembered_sizes(self._symbols.environment, self._symbols.memory)

    def fake(self, meta: TensorMeta, device: torch.device) -> Tensor:
        """Create a tensor with some metadata; call it under the fake mode."""
        shape, stride = (list(map(self._size, n)) for n in (meta.shape, meta.stride))
        return torch.empty_strided(shape, stride, dtype=meta.dtype, device=device)

    def conditions(self) -> tuple[sympy.Basic, ...]:
        """The conditions on the symbols under which another trace would be the same."""
        if self._symbols is None:
            return ()
        environment = self._symbols.environment
        found: dict[Any, None] = {s >= 2: None for s in self._example}
        found |= {in_named_sizes(g.expr, environment): None for g in environment.guards}
        return tuple(c for c in found if c.free_symbols)

    def _size(self, number: Any) -> Any:
        if isinstance(number, int):
            return number
        assert self._symbols is not None
        known = self._symbols.sizes
        if number not in known:
            values = {s: sympy.Integer(n) for s, n in self._example.items()}
            known[number] = size_of_expression(
                self._symbols.environment,
                number.xreplace(self._symbols.own),
                int(number.xreplace(values)),
            )
        return known[number]
