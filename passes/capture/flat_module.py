"""A model as a function from flat tensors to flat tensors, which is all that export must know."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError

from .buffer_assignment import in_place, is_assigned
from .module_state import PLAIN, Attribute, attributes, changes, held_buffers, put

if TYPE_CHECKING:
    from collections.abc import Sequence


class Hole:
    """Stands for a tensor among the leaves of a result."""


@dataclasses.dataclass
class _Result:
    """The model's result as its last call gave it (kept apart: export forbids new attributes)."""

    leaves: list[Any] = dataclasses.field(default_factory=list)
    spec: pytree.TreeSpec | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    remains: list[Attribute] = dataclasses.field(default_factory=list)
    assigned: list[str] = dataclasses.field(default_factory=list)


class Flat(nn.Module):
    """The model as a function from flat tensors to flat tensors, which is all export must know.

    What the model leaves in its modules' attributes is noted in `result`, and taken back. A buffer
    that it assigns is given the new value in place, where the graph shows it.
    """

    prefix = "model."

    def __init__(self, model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.tensor_positions = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        self._template = _Opaque([None if isinstance(x, Tensor) else x for x in leaves])
        self._spec = _Opaque(spec)
        self._result = _Result()

    @property
    def result(self) -> _Result:
        return self._result

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._template.value)
        for position, tensor in zip(self.tensor_positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec.value)
        before = attributes(self.model)
        with held_buffers(self.model):
            try:
                out = self.model(*args, **kwargs)
            finally:
                changed = changes(self.model, before)
                put(changed, "before")
        assigned = [c for c in changed if is_assigned(c)]
        self._result.assigned = [str(c) for c in assigned]
        self._result.remains = [c for c in changed if not is_assigned(c)]
        register_dataclasses(out)
        found, spec = pytree.tree_flatten(out, is_leaf=_is_cache)
        result = self._result
        result.leaves, result.spec, result.notes = [], spec, []
        values = []
        for leaf in found:
            if isinstance(leaf, Tensor):
                values.append(leaf)
                result.leaves.append(Hole())
            elif _is_cache(leaf):
                if kwargs.get("use_cache"):
                    raise CaptureError(
                        "the call asks for a key/value cache, which a pipeline does not return",
                        found=type(leaf).__name__,
                        remedy="call without use_cache=True",
                    )
                result.notes.append(f"left out of the result: {type(leaf).__name__}")
                result.leaves.append(None)
            elif isinstance(leaf, (*PLAIN, torch.SymInt, torch.SymFloat, torch.SymBool)):
                result.leaves.append(leaf)
            else:
                raise CaptureError(
                    "the model returns an object that is neither a tensor nor a known container",
                    found=f"{type(leaf).__module__}.{type(leaf).__qualname__}",
                    remedy="return tensors in tuples, lists, dicts, named tuples or dataclasses, or"
                    " register the class with torch.utils._pytree.register_pytree_node",
                )
        return in_place(self.model, assigned, values)


@dataclasses.dataclass
class _Opaque:
    """Keeps a container out of export's walk over a module's attributes."""

    value: Any


def _is_cache(value: Any) -> bool:
    """A transformers key/value cache: returned by default, of no use in training."""
    return any(
        c.__name__ == "Cache" and "transformers" in c.__module__ for c in type(value).__mro__
    )


def register_dataclasses(value: Any) -> None:
    """Make plain dataclasses among inputs or results known as containers."""
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and not _is_cache(leaf):
            pytree.register_dataclass(type(leaf))
            register_dataclasses(leaf)
