"""Find which inputs of a call are batched, in which dimension, and the number of samples."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from autopipe.errors import InputError, OptionError, shown
from autopipe.passes.capture import Parts, argument_names, take_apart
from autopipe.passes.python_state import packed_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MOST_SHOWN = 8
"""Tensors that the message lists for inputs with different numbers of samples."""


def batch_of(
    in_dims: Any, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[int | None, ...], int]:
    """Find the batch dimension of each input, and the batch size.

    Args:
        in_dims: an integer or None for all inputs; a tuple for the positional ones (keyword inputs
            are then batched in dimension 0), its entries may be nested like the inputs; or a dict
            by argument name, in which arguments that are left out are batched in dimension 0.
            Tensors without dimensions are never batched.
        model: for the names of its arguments.

    Returns:
        For each leaf of ``(args, kwargs)`` the dimension that micro-batches split, or None; and the
        number of samples.

    Raises:
        OptionError: `in_dims` does not fit the inputs.
        InputError: there is no sample, or batched inputs have different numbers of samples; an
            input is a packed sequence.
    """
    if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
        raise packed_error(InputError)
    args = tuple(map(take_apart, args))  # as `call_signature.flatten` does
    kwargs = {n: take_apart(v) for n, v in sorted(kwargs.items())}
    leaves = pytree.tree_leaves((args, kwargs))
    requested = chain(*_requested_dims(in_dims, model, args, kwargs))
    dims = tuple(_dim(leaf, dim) for leaf, dim in zip(leaves, requested, strict=True))
    sizes = [x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None]
    if not sizes:
        raise InputError(
            "no input has a batch dimension",
            expected="a tensor with at least one dimension",
            found=", ".join(dict.fromkeys(map(_class_of, leaves))) or "no inputs",
            remedy="pass at least one batched tensor: torch.as_tensor(array) makes one of an array"
            " or a list; in_dims says which dimension holds the samples",
        )
    if len(set(sizes)) > 1:
        named = [*zip(_positional_names(model, len(args)), args, strict=True), *kwargs.items()]
        paths = [
            (name, pytree.keystr(path))
            for name, value in named
            for path, _ in pytree.tree_leaves_with_path(value)
        ]
        raise _sizes_differ(dict(named), paths, leaves, dims)
    if sizes[0] == 0:
        raise InputError("a batch without samples", found="0 samples")
    return dims, int(sizes[0])


def _sizes_differ(
    named: Mapping[str, Any],
    paths: Sequence[tuple[str, str]],
    leaves: Sequence[Any],
    dims: Sequence[int | None],
) -> InputError:
    """The error for inputs with different numbers of samples; its remedy names the inputs.

    Args:
        named: the arguments.
        paths: for each leaf the name of its argument, and where the leaf is in it.
        leaves: of the arguments.
        dims: for each leaf its batch dimension, or None.
    """
    sizes: dict[str, set[int]] = {}
    found = []
    for (name, path), x, d in zip(paths, leaves, dims, strict=True):
        if d is not None:
            sizes.setdefault(name, set()).add(x.shape[d])
            found.append(f"{name}{path}: {x.shape[d]} in dimension {d} of {tuple(x.shape)}")
    found = [*found[:MOST_SHOWN], *(["…"] if len(found) > MOST_SHOWN else [])]
    usual = Counter(n for ns in sizes.values() if len(ns) == 1 for n in ns).most_common(1)
    others = [n for n, ns in sizes.items() if not usual or ns != {usual[0][0]}]
    own = dict(zip((name for name, _ in paths), dims, strict=True))
    suggested = {n: None if n in others else own[n] for n in sizes if n in others or own[n] != 0}
    remedy = (
        "give all the same number of samples, or say which inputs are not batched, for example"
        f" in_dims={suggested}"
    )
    each = [n for n in others if _has_entry_per_sample(named[n], usual[0][0] if usual else None)]
    if each:
        remedy = (
            f"{each[0]!r} has an entry for each sample, which cannot be split into micro-batches:"
            " if only a loss reads it, leave it out of the call, let the model return its"
            " predictions, and compute the loss outside (or with"
            f" compile(..., loss_fn=...) and pipe.step(..., target={each[0]})); else pad its"
            " tensors to one shape and stack them"
        )
    return InputError(
        "the inputs differ in their number of samples", found="; ".join(found), remedy=remedy
    )


def _has_entry_per_sample(value: Any, samples: int | None) -> bool:
    """Whether a list describes each sample by an entry of its own: a detector's targets.

    Args:
        value: an argument.
        samples: how many samples the other inputs have; None: they differ, too.
    """
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if all(isinstance(entry, (dict, Parts)) for entry in value):
        return True
    return len(value) == samples and all(isinstance(x, (Tensor, list, tuple)) for x in value)


def _class_of(leaf: Any) -> str:
    """What an input is, for a message: ``Tensor of shape ()``, ``numpy.ndarray``, ``float``."""
    if isinstance(leaf, Tensor):
        return f"{type(leaf).__name__} of shape {tuple(leaf.shape)}"
    kind = type(leaf)
    inner = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{inner}{kind.__qualname__}"


def _requested_dims(
    in_dims: Any, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[int | None], list[int | None]]:
    """The entries of `in_dims` for the leaves of `args`, and for those of `kwargs`."""
    if isinstance(in_dims, dict):
        names = _positional_names(model, len(args))
        unknown = set(in_dims) - set(names) - set(kwargs)
        if unknown:
            raise OptionError(
                "in_dims names inputs that the call does not have",
                expected=f"some of {sorted({*names, *kwargs})}",
                found=", ".join(sorted(map(shown, unknown))),
            )
        of_args: Any = tuple(in_dims.get(n, 0) for n in names)
        of_kwargs: Any = {n: in_dims.get(n, 0) for n in kwargs}
    elif isinstance(in_dims, (tuple, list)):
        of_args, of_kwargs = tuple(in_dims), 0
    else:
        of_args = of_kwargs = in_dims
    return _broadcast_dims(of_args, args, "args"), _broadcast_dims(of_kwargs, kwargs, "kwargs")


def _positional_names(model: Any, count: int) -> list[str]:
    """Names of the model's first `count` positional arguments."""
    names = argument_names(model)[:count]
    return names + [f"args[{i}]" for i in range(len(names), count)]


def _dim(leaf: Any, dim: int | None) -> int | None:
    """The batch dimension of a leaf, not negative; None if it has none."""
    if dim is None or not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return None
    if not -leaf.ndim <= dim < leaf.ndim:
        raise InputError(
            f"in_dims asks for dimension {dim} of a tensor that has {leaf.ndim}",
            expected="a dimension of every batched input; None for those that are not",
            found=f"shape {tuple(leaf.shape)}",
        )
    return dim % leaf.ndim


def _broadcast_dims(dims: Any, value: Any, where: str) -> list[int | None]:
    """One entry for every leaf of `value`; `dims` may stop at a container of several."""
    if isinstance(value, Parts):
        value = value.as_dict()
    if dims is None or (isinstance(dims, int) and not isinstance(dims, bool)):
        return [dims] * len(pytree.tree_leaves(value))
    if isinstance(dims, (tuple, list)) and isinstance(value, (tuple, list)):
        if len(dims) == len(value):
            pairs = zip(dims, value, strict=True)
            return [
                d for n, (a, b) in enumerate(pairs) for d in _broadcast_dims(a, b, f"{where}[{n}]")
            ]
    elif isinstance(dims, dict) and isinstance(value, dict) and dims.keys() == value.keys():
        return [d for k, v in value.items() for d in _broadcast_dims(dims[k], v, f"{where}[{k!r}]")]
    raise OptionError(
        "in_dims does not fit the inputs",
        expected=f"an integer, None or the structure of {where}",
        found=shown(dims),
    )
