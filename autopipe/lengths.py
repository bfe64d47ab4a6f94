"""Which dimensions of a call are lengths: sizes besides the batch that change from call to call.

As in `torch.compile`, the first call is captured with fixed sizes. When a size changes, its
dimension becomes symbolic in the next capture, which then serves all sizes. A user may name such
dimensions beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.errors import OptionError
from autopipe.passes.capture import argument_names, leaf_names, take_apart

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from autopipe.call_signature import CallInputs
    from autopipe.passes.ir import Captured

LengthDims = tuple[dict[int, "str | None"], ...]
"""For each leaf of a call the dimensions that are lengths, with their names or None."""


def marked_lengths(
    dynamic: Mapping[str, Mapping[int, str | None]] | None,
    model: Any,
    inputs: CallInputs,
) -> LengthDims:
    """The lengths that the user marked: by the option, or by `torch._dynamo.mark_dynamic`.

    Args:
        dynamic: the option; it may name arguments that the call does not have.
        model: for the names of its arguments.
        inputs: the call.

    Raises:
        OptionError: a tensor does not have the dimension, or it is the batch dimension.
    """
    if dynamic:
        args, kwargs = pytree.tree_unflatten(inputs.leaves, inputs.spec)
        names = argument_names(model)
        named = [*zip(names, args, strict=False), *(("", a) for a in args[len(names) :])]
        pairs = (*named, *kwargs.items())
        owners = [name for name, value in pairs for _ in pytree.tree_leaves(take_apart(value))]
        asked = [dict(dynamic.get(owner, {})) for owner in owners]
    else:
        asked = [{} for _ in inputs.leaves]
    found = []
    for leaf, dims, batch in zip(inputs.leaves, asked, inputs.batch_dims, strict=True):
        if isinstance(leaf, Tensor):
            marked = getattr(leaf, "_dynamo_dynamic_indices", ())
            dims |= {d: None for d in marked if d != batch and d not in dims}
            found.append({_dim(leaf, d, batch): name for d, name in dims.items()})
        else:
            found.append({})
    return tuple(found)


def _dim(leaf: Tensor, dim: int, batch: int | None) -> int:
    if not -leaf.ndim <= dim < leaf.ndim or dim % leaf.ndim == batch:
        raise OptionError(
            "dynamic names a dimension that cannot be a length",
            expected="a dimension that the tensor has, and not its batch dimension",
            found=f"dimension {dim} of shape {tuple(leaf.shape)}",
        )
    return dim % leaf.ndim


def changed_lengths(
    inputs: CallInputs,
    captured: Sequence[tuple[Sequence[Any], LengthDims]],
    marked: LengthDims,
) -> LengthDims:
    """The dimensions that are marked, or whose sizes differ from those of earlier captures.

    Args:
        inputs: the call.
        marked: what the user marked.
        captured: for each capture the shapes of its leaves, and its lengths.
    """
    found = [dict(dims) for dims in marked]
    for shapes, lengths in captured:
        for dims, leaf, batch, shape, known in zip(
            found, inputs.leaves, inputs.batch_dims, shapes, lengths, strict=True
        ):
            if isinstance(leaf, Tensor):
                dims |= {d: None for d in known if d not in dims}
                sizes = zip(leaf.shape, shape, strict=True)
                changed = [d for d, (new, old) in enumerate(sizes) if new != old and d != batch]
                dims |= {d: None for d in changed if d not in dims}
    return tuple(found)


def named_lengths(
    inputs: CallInputs,
    lengths: LengthDims,
    earlier: Sequence[Sequence[Any]],
    model: Any,
    fixed: Container[tuple[int, int]],
) -> LengthDims:
    """The lengths that can be symbolic, each with a name.

    A size of 0 or 1 is never symbolic. Dimensions that had the same size in every call so far are
    one length.

    Args:
        inputs: the call.
        lengths: what may be symbolic.
        earlier: the shapes of the leaves of earlier captures.
        model: for the names of its arguments.
        fixed: (position of a leaf, dimension) for those that the model fixes.
    """
    names = leaf_names(model, inputs.leaves, inputs.spec)
    found: list[dict[int, str | None]] = [{} for _ in lengths]
    shared: dict[tuple[int, ...], str] = {}
    for n, dims in enumerate(lengths):
        for d, name in dims.items():
            if inputs.leaves[n].shape[d] > 1 and (n, d) not in fixed:
                sizes = (inputs.leaves[n].shape[d], *(shapes[n][d] for shapes in earlier))
                found[n][d] = name or shared.setdefault(sizes, f"{names[n]}_dim{d}")
    return tuple(found)


def lengths_of(captured: Captured, leaves: int) -> LengthDims:
    """The lengths of a captured graph.

    Args:
        captured: the graph.
        leaves: how many leaves its calls have.
    """
    found: list[dict[int, str | None]] = [{} for _ in range(leaves)]
    for length in captured.lengths:
        for n, dim in length.places:
            found[n][dim] = str(length.name)
    for n, dim, _ in captured.derived_sizes:
        found[n][dim] = None
    return tuple(found)
