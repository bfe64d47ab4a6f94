"""Flatten a call's inputs, and compare their structure with that of captured calls."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.call_numbers import as_tensors, is_number
from autopipe.errors import InputError, OptionError, shortened, shown
from autopipe.passes._torch import FakeTensor
from autopipe.passes.capture import take_apart
from autopipe.passes.python_state import Identity, value_key

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Sequence


def flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten a call's inputs; objects that hold tensors are taken apart.

    Keywords are sorted, because their order makes no difference.

    Args:
        args, kwargs: of the call.

    Returns:
        Leaves and structure.

    Raises:
        InputError: a tensor is sparse or nested: a batch is split into views.
    """
    leaves: list[Any]
    leaves, spec = pytree.tree_flatten(
        (tuple(map(take_apart, args)), {n: take_apart(v) for n, v in sorted(kwargs.items())})
    )
    for x in leaves:
        if isinstance(x, Tensor) and (x.layout is not torch.strided or x.is_nested):
            raise InputError(
                "an argument is a tensor that is not dense",
                expected="layout torch.strided",
                found="a nested tensor" if x.is_nested else f"layout {x.layout}",
                remedy="pass it dense (x.to_dense(), torch.nested.to_padded_tensor), or pass its"
                " indices and values and build it outside of the pipeline",
            )
    return leaves, spec


class CallInputs(NamedTuple):
    """A call's inputs, flattened.

    Attributes:
        leaves: tensors and other values.
        spec: structure of ``(args, kwargs)``.
        batch_dims: for each leaf the dimension that micro-batches split, or None.
        batch: number of samples.
    """

    leaves: list[Any]
    spec: pytree.TreeSpec
    batch_dims: tuple[int | None, ...]
    batch: int

    def with_tensors(self, numbers: Collection[int]) -> CallInputs:
        """Return the same call with some numbers as tensors.

        Args:
            numbers: their positions among the leaves.
        """
        return self._replace(leaves=as_tensors(self.leaves, numbers)) if numbers else self

    def static_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The tensors' shapes without their batch dimensions."""
        return tuple(
            tuple(n for d, n in enumerate(x.shape) if d != dim)
            for x, dim in zip(self.leaves, self.batch_dims, strict=True)
            if isinstance(x, Tensor)
        )


class CallSignature(NamedTuple):
    """What a call must have in common with a captured one; sizes and numbers may differ.

    Attributes:
        spec: structure of ``(args, kwargs)``.
        leaves: for tensors dtype and number of dimensions, for numbers the type; the keys of other
            values, by which they are compared.
        shown: the leaves as text.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Hashable, ...]
    shown: tuple[str, ...]

    @classmethod
    def of(cls, inputs: CallInputs) -> CallSignature:
        """The signature of a call."""
        keys: list[Hashable] = []
        texts: list[str] = []
        for x in inputs.leaves:
            if isinstance(x, Tensor):
                if type(x) not in KINDS_OF_TENSORS:
                    raise subclass_error(x)
                keys.append((x.dtype, x.ndim))
                texts.append(f"{str(x.dtype).removeprefix('torch.')} {x.ndim}-d")
            else:
                keys.append(("number", type(x)) if is_number(x) else _comparable(x))
                texts.append(shortened(shown(x), LONGEST_VALUE))
        return cls(inputs.spec, tuple(keys), tuple(texts))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, CallSignature)
            and self.leaves == other.leaves
            and self.spec == other.spec
        )

    def __ne__(self, other: object) -> bool:  # a tuple's own compares `shown`
        return not self == other

    def __hash__(self) -> int:
        return hash(self.leaves)


KINDS_OF_TENSORS = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)
"""Types of the tensors that a call may pass; subclasses may compute something else."""


def subclass_error(tensor: Tensor) -> InputError:
    """Return the error for an argument of a subclass of `torch.Tensor`."""
    return InputError(
        "an argument is of a subclass of torch.Tensor, whose operators may be others",
        found=f"{type(tensor).__module__}.{type(tensor).__qualname__}",
        remedy="pass a plain tensor: tensor.as_subclass(torch.Tensor)",
    )


def _comparable(value: Any) -> Hashable:
    """The key by which an argument that is no tensor is compared with the captured one.

    Raises:
        InputError: it cannot be compared, or changes when it is used.
    """
    key = value_key(value, objects=True)
    kept = isinstance(value, (type, ModuleType, nn.Module)) or callable(value)
    if hasattr(type(value), "__next__") or (isinstance(key, Identity) and not kept):
        raise InputError(
            "an argument is neither a tensor nor a value that can be compared from call to call",
            found=f"{type(value).__module__}.{type(value).__qualname__}",
            remedy="pass tensors, numbers, strings, arrays, containers of these, or objects whose"
            " attributes are such values; set other objects as attributes of the model",
        )
    return key


LONGEST_VALUE = 100
"""Characters of a value in an error message."""


class ChangedLeaf(NamedTuple):
    """A leaf in which two calls of the same structure differ.

    Attributes:
        argument: its name, or ``args[0]``.
        old, new: the leaf as text.
        of_tensor: whether one of the two is a tensor.
    """

    argument: str
    old: str
    new: str
    of_tensor: bool


def changed_leaves(
    old: CallSignature,
    new: CallSignature,
    names: Sequence[str] = (),
    numbers: Collection[int] = (),
) -> list[ChangedLeaf] | None:
    """Return the leaves in which two calls differ; None if their structures differ.

    Args:
        old, new: the signatures.
        names: of the model's arguments by position.
        numbers: positions of leaves that differ although signatures do not tell them apart.
    """
    if old.spec != new.spec:
        return None
    marks = [torch.empty(0) for _ in new.leaves]  # tensors, so that objects are taken apart again
    args, kwargs = pytree.tree_unflatten(marks, new.spec)
    called = [*names, *(f"args[{n}]" for n in range(len(names), len(args)))]
    entries = [*zip(called, args, strict=False), *kwargs.items()]
    owners = {id(x): name for name, v in entries for x in pytree.tree_leaves(take_apart(v))}
    return [
        ChangedLeaf(
            owners[id(marks[i])], old.shown[i], new.shown[i], _is_tensor(a) or _is_tensor(b)
        )
        for i, (a, b) in enumerate(zip(old.leaves, new.leaves, strict=True))
        if a != b or i in numbers
    ]


def _is_tensor(leaf: Hashable) -> bool:
    return isinstance(leaf, tuple) and len(leaf) == 2 and isinstance(leaf[0], torch.dtype)


def described(structure: CallSignature) -> str:
    """Write a call as code, with tensors as dtype and number of dimensions.

    Args:
        structure: of the call.
    """

    class Shown(str):
        __repr__ = str.__str__

    texts = list(map(Shown, structure.shown))
    args, kwargs = pytree.tree_unflatten(texts, structure.spec)
    parts = [shown(a) for a in args] + [f"{k}={shown(v)}" for k, v in kwargs.items()]
    return f"pipe({', '.join(parts)})"


def examples(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Check that example inputs are a sequence and a dictionary by name, and return them.

    Args:
        args, kwargs: as for `compile`.

    Raises:
        OptionError: they are not.
    """
    if not isinstance(args, (tuple, list)):
        expected = "a tuple of positional inputs: args=(x,)"
        raise OptionError("`args` is no tuple", expected=expected, found=type(args).__name__)
    named = kwargs is None or isinstance(kwargs, Mapping)
    if not named or not all(isinstance(name, str) for name in kwargs or ()):
        raise OptionError(
            "`kwargs` is no dictionary of inputs by name",
            expected='kwargs={"x": x}',
            found=type(kwargs).__name__ if not named else ", ".join(map(shown, kwargs)),
        )
    return tuple(args), dict(kwargs or {})
