"""The dimensions that are symbolic while a model is traced, and what their symbols mean.

The batch dimension always is. Others ("lengths") are if a call asks for it: a sequence length that
changes from batch to batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import sympy
import torch

from autopipe.errors import UnsupportedError
from autopipe.passes.graph import SizeNames, in_named_sizes, name_sizes
from autopipe.passes.ir import B, Length

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class SymbolicDims(NamedTuple):
    """The dimensions of one tensor that are symbolic.

    Attributes:
        batch: the batch dimension, or None.
        lengths: other dimensions → the names that the user gave them, or None.
    """

    batch: int | None
    lengths: Mapping[int, str | None]

    def for_export(self) -> dict[int, Any]:
        """What `torch.export` is told about the tensor's dimensions."""
        dims = [*self.lengths, *([] if self.batch is None else [self.batch])]
        return dict.fromkeys(dims, torch.export.Dim.AUTO)


class NamedLengths(NamedTuple):
    """The lengths of a trace.

    Attributes:
        lengths: with their places as (position of a tensor, dimension).
        derived: (position of a tensor, dimension, size) for each size that is computed from others:
            the model only accepts a target that is one shorter than the input.
    """

    lengths: tuple[Length, ...]
    derived: tuple[tuple[int, int, Any], ...]


def name_symbols(
    program: torch.export.ExportedProgram,
    examples: Sequence[Tensor],
    dims: Sequence[SymbolicDims],
    names: Sequence[str],
) -> NamedLengths:
    """Name the symbols of an exported program after the dimensions that they stand for.

    A dimension that the model fixes has no symbol, and so no name.

    Args:
        program: the program.
        examples: the tensors that it was traced with.
        dims: their symbolic dimensions.
        names: of the tensors.

    Raises:
        UnsupportedError: a length must be equal to the batch size.
    """
    inputs = program.graph_signature.user_inputs
    fakes = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    tensors = [fakes[str(name)] for name in inputs]
    symbols: dict[Any, sympy.Symbol] = {}
    for tensor, dim in zip(tensors, dims, strict=True):
        if dim.batch is not None:
            symbols |= dict.fromkeys(_expr(tensor, dim.batch).free_symbols, B)
    places: dict[sympy.Symbol, list[tuple[int, int]]] = {}
    computed: list[tuple[int, int]] = []
    lengths = [(n, d, name) for n, dim in enumerate(dims) for d, name in dim.lengths.items()]
    for n, d, name in lengths:
        expr = _expr(tensors[n], d)
        if not expr.is_Symbol:
            computed += [(n, d)] if expr.free_symbols else []
            continue
        found = symbols.setdefault(expr, sympy.Symbol(name or f"{names[n]}_dim{d}"))
        if found == B:
            raise UnsupportedError(
                "a length must be equal to the batch size",
                node=names[n],
                found=f"dimension {d} of {names[n]}, and the batch dimension",
            )
        places.setdefault(found, []).append((n, d))
    result = tuple(
        Length(s, examples[at[0][0]].shape[at[0][1]], tuple(at)) for s, at in places.items()
    )
    environment = _environment(tensors)
    if environment is None:
        return NamedLengths((), ())
    name_sizes(environment, SizeNames(symbols, {x.name: sympy.Integer(x.example) for x in result}))
    derived = [(n, d, in_named_sizes(_expr(tensors[n], d), environment)) for n, d in computed]
    for n, d, expr in derived:
        if unknown := expr.free_symbols - {x.name for x in result} - {B}:
            raise UnsupportedError(
                "a length is computed from sizes that no input has",
                node=names[n],
                found=f"dimension {d} of {names[n]} is {expr}: {', '.join(map(str, unknown))}",
            )
    return NamedLengths(result, tuple(derived))


def _expr(tensor: Any, dim: int) -> Any:
    size = tensor.shape[dim]
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _environment(tensors: Sequence[Any]) -> Any:
    sizes = (s for t in tensors for s in t.shape if isinstance(s, torch.SymInt))
    return next((s.node.shape_env for s in sizes), None)
