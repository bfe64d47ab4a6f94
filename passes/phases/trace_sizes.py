"""The sizes of one trace: numbers, or symbols with the conditions under which the trace holds."""

from __future__ import annotations

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
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from autopipe.passes._torch import FakeTensorMode
    from autopipe.passes.ir import Sizes

    from .metadata import TensorMeta


class TraceSizes:
    """The sizes of one trace.

    Args:
        metas: of the tensors that are traced.
        example: the values of all symbols in them.
    """

    def __init__(self, metas: Iterable[TensorMeta], example: Sizes) -> None:
        symbols: set[Any] = set()
        for meta in metas:
            for n in meta.shape:
                symbols |= n.free_symbols if isinstance(n, sympy.Basic) else set()
        self._example = {s: example[s] for s in sorted(symbols, key=str)}
        self._environment = ShapeEnv() if symbols else None
        self._own: dict[Any, Any] = {}  # symbol → the one in the environment
        self._known: dict[Any, Any] = {}
        if self._environment is not None:
            for symbol, n in self._example.items():
                own, self._known[symbol] = create_size_symbol(self._environment, str(symbol), n)
                self._own[symbol] = own
            names = {own: symbol for symbol, own in self._own.items()}
            name_sizes(self._environment, SizeNames(names, {}))

    def fake_mode(self) -> FakeTensorMode:
        """Create the mode to trace in."""
        return static_fake_mode() if self._environment is None else fake_mode(self._environment)

    def remembered(self) -> AbstractContextManager[None]:
        """While tracing: compute each operation on sizes once."""
        return remembered_sizes(self._environment)

    def fake(self, meta: TensorMeta, device: torch.device) -> Tensor:
        """Create a tensor with some metadata; call it under the fake mode."""
        shape, stride = (list(map(self._size, n)) for n in (meta.shape, meta.stride))
        return torch.empty_strided(shape, stride, dtype=meta.dtype, device=device)

    def conditions(self) -> tuple[sympy.Basic, ...]:
        """The conditions on the symbols under which another trace would be the same."""
        environment = self._environment
        if environment is None:
            return ()
        found: dict[Any, None] = {s >= 2: None for s in self._example}
        found |= {in_named_sizes(g.expr, environment): None for g in environment.guards}
        return tuple(c for c in found if c.free_symbols)

    def _size(self, number: Any) -> Any:
        if isinstance(number, int):
            return number
        if number not in self._known:
            assert self._environment is not None
            values = {s: sympy.Integer(n) for s, n in self._example.items()}
            self._known[number] = size_of_expression(
                self._environment,
                number.xreplace(self._own),
                int(number.xreplace(values)),
            )
        return self._known[number]
