"""The kinds of models that a user may pass: one `Frontend` each, in the table `FRONTENDS`.

All other code uses these functions: `as_module` returns the module whose parameters are trained,
`is_model` checks an object, `argument_names` returns the names of its arguments, and `frontend_of`
returns the front end that traces it. A new kind of model is one entry in the table.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from autopipe.errors import OptionError, shown

from .exporting import export
from .normalize import Normalized, normalize
from .number_checks import arithmetic_limits, check_same_ops, check_same_result
from .size_uses import SizeUses
from .symbolic_dims import SymbolicDims, name_symbols

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .flat_module import FlatModel

UserModel = nn.Module | fx.GraphModule | torch.export.ExportedProgram
"""What a user may pass as a model."""


def export_and_normalize(
    flat: FlatModel,
    examples: Sequence[Tensor],
    dims: Sequence[SymbolicDims],
    names: Sequence[str],
) -> tuple[Normalized, SizeUses]:
    """Trace a module by torch.export.

    Args:
        flat: the module, as a function of flat tensors.
        examples: one tensor for each argument of `flat`.
        dims: for each of them the dimensions that become symbolic.
        names: what to call them in the graph.

    Returns:
        The normalized graph, and how the module's own code used symbolic sizes.

    Raises:
        CaptureError: the module cannot be exported.
        UnsupportedError: its graph holds something that later passes cannot handle.
    """
    program, sizes = export(flat, examples, dims)
    if flat.numbers.values:
        _check_numbers(program, flat, examples, dims)
    sizes.named = name_symbols(program, examples, dims, names)
    reserved = [str(length.name) for length in sizes.named.lengths]
    return normalize(program, flat.model, flat.prefix, names, reserved), sizes


def _check_numbers(
    program: torch.export.ExportedProgram,
    flat: FlatModel,
    examples: Sequence[Tensor],
    dims: Sequence[SymbolicDims],
) -> None:
    """Check that a program with numbers among its inputs is that of the model with these numbers.

    Raises:
        CaptureError: it is not.
    """
    flat.numbers.require(arithmetic_limits(program, flat.numbers.examples))
    kept = [p not in flat.numbers for p in flat.tensor_positions]
    constant = flat.with_values()
    again, _ = export(constant, [*compress(examples, kept)], [*compress(dims, kept)])
    check_same_result(flat.result, constant.result)
    check_same_ops(program, again, flat.numbers.examples)


@dataclass(frozen=True)
class Frontend:
    """One kind of model.

    Attributes:
        name: what messages call it.
        accepts: whether an object is a model of this kind, or the module created from one.
        module: model → the module whose parameters are trained and whose `forward` is called. It
            must be accepted by the same front end.
        trace: (flat module, examples, batch dimensions, names) → normalized graph; see
            `export_and_normalize`.
    """

    name: str
    accepts: Callable[[Any], bool]
    module: Callable[[Any], nn.Module] = lambda model: model
    trace: Callable[..., tuple[Normalized, SizeUses]] = export_and_normalize


FRONTENDS = (
    Frontend("torch.nn.Module", lambda model: isinstance(model, nn.Module)),
    Frontend("torch.fx.GraphModule", lambda model: isinstance(model, fx.GraphModule)),
    Frontend(
        "torch.export.ExportedProgram",
        lambda model: isinstance(model, torch.export.ExportedProgram),
        module=lambda program: program.module(),
    ),
)
"""Every kind of model; the first one that accepts an object is used."""


def is_model(value: Any) -> bool:
    """Whether a user may pass this as a model."""
    return any(frontend.accepts(value) for frontend in FRONTENDS)


def frontend_of(model: Any) -> Frontend:
    """The front end for a model.

    Args:
        model: what the user passed, or the module created from it.

    Raises:
        OptionError: it is no kind of model in `FRONTENDS`.
    """
    for frontend in FRONTENDS:
        if frontend.accepts(model):
            return frontend
    *names, last = (frontend.name for frontend in FRONTENDS)
    raise OptionError(
        "model is not a module",
        expected=f"{', '.join(names)} or {last}",
        found=shown(model) if isinstance(model, type) else type(model).__name__,
        remedy="create the module: Model(...)" if isinstance(model, type) else None,
    )


def as_module(model: UserModel) -> nn.Module:
    """The module whose parameters are trained and whose `forward` is called.

    Args:
        model: what the user passed.

    Raises:
        OptionError: it is no kind of model in `FRONTENDS`.
    """
    return frontend_of(model).module(model)


def argument_names(model: UserModel) -> list[str]:
    """Names of the positional arguments of a model's forward, in order.

    Args:
        model: what the user passed, or the module created from it.

    Raises:
        OptionError: it is no kind of model in `FRONTENDS`.
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(as_module(model).forward).parameters.values()
    return [p.name for p in parameters if p.kind in positional]
