"""Take objects that hold tensors apart, so that pytree functions see the tensors.

torch's pytree knows lists, tuples, dicts and what has been registered; any other object is a leaf.
`take_apart` replaces dataclasses, mappings of libraries (`BatchEncoding`) and objects of users'
classes by `Parts`, which pytree flattens; unflattening creates an object of the same class again,
without calling its constructor. Nothing is registered for the users' classes themselves.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.passes.python_state import (
    attribute_names,
    extra_key,
    is_made_of_attributes,
    raw_dict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    Key = tuple[pytree.KeyEntry, Any]

PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None))


MOST_ATTRIBUTES = 100
"""An object with more attributes stays whole: it is no batch."""

DEEPEST = 4
"""Objects inside of so many others stay whole; an object may refer to itself."""


def is_cache(value: Any) -> bool:
    """Whether this is a transformers key/value cache: returned by default, unused in training."""
    return any(
        c.__name__ == "Cache" and "transformers" in c.__module__ for c in type(value).__mro__
    )


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What an object is besides its parts; equal for objects of the same structure.

    Attributes:
        type: its class.
        names: its attributes, or keys.
        empty: creates an object without parts.
        by_key: whether the parts are items, not attributes.
        others: its attributes besides items.
    """

    type: type
    names: tuple[Any, ...]
    empty: Callable[[], Any] = dataclasses.field(compare=False)
    by_key: bool = False
    others: Hashable = ()


class Parts:
    """An object that was taken apart.

    Args:
        kind: what it is besides.
        values: its attributes or items, in the order of `kind.names`.
    """

    def __init__(self, kind: _Kind, values: Sequence[Any]) -> None:
        self.kind, self.values = kind, list(values)

    def as_dict(self) -> dict[Any, Any]:
        """The parts by name."""
        return dict(zip(self.kind.names, self.values, strict=True))


def take_apart(value: Any) -> Any:
    """Replace objects that hold tensors by `Parts`, also inside containers.

    Args:
        value: arguments or a result, nested.

    Returns:
        The same structure. `pytree.tree_unflatten` of what it is flattened to creates the objects.
    """
    return value if isinstance(value, PLAIN) else _taken_apart(value, 0)


def kinds_in(spec: pytree.TreeSpec) -> list[type]:
    """The classes of the objects that were taken apart.

    Args:
        spec: the structure of what `take_apart` returned.
    """
    own = [spec.context.type] if spec.type is Parts else []
    return own + [kind for child in spec.children() for kind in kinds_in(child)]


def _taken_apart(value: Any, depth: int) -> Any:
    return pytree.tree_map(lambda leaf: _taken(leaf, depth), value)


def _taken(leaf: Any, depth: int) -> Any:
    if isinstance(leaf, (*PLAIN, type, nn.Module)) or callable(leaf) or is_cache(leaf):
        return leaf
    parts = _parts_of(leaf) if depth < DEEPEST else None
    if parts is None:
        return leaf
    parts.values = [_taken_apart(v, depth + 1) for v in parts.values]
    wanted = dataclasses.is_dataclass(leaf) or isinstance(leaf, Mapping)
    return parts if wanted or _holds_tensor(parts) else leaf


def _holds_tensor(parts: Parts) -> bool:
    return any(isinstance(x, Tensor) for x in pytree.tree_leaves(parts))


def _parts_of(value: Any) -> Parts | None:
    kind: Any = type(value)
    if isinstance(value, (dict, Mapping)):
        items = raw_dict(value) if isinstance(value, dict) else dict(value.items())
        rebuilt = _empty_mapping(value)
        if rebuilt is not None:
            others = extra_key(value)
            own = _Kind(kind, tuple(items), rebuilt, by_key=True, others=others)
            return Parts(own, list(items.values()))
        return None
    if not is_made_of_attributes(value):
        return None
    names = attribute_names(value)
    if len(names) > MOST_ATTRIBUTES:
        return None
    values = [getattr(value, n) for n in names]
    return Parts(_Kind(kind, tuple(names), lambda: kind.__new__(kind)), values)


def _empty_mapping(value: Any) -> Callable[[], Any] | None:
    """A function that creates an empty mapping like this one, with its other attributes."""
    try:
        template = copy.copy(value)
        if isinstance(template, dict):
            dict.clear(template)
        elif isinstance(getattr(template, "data", None), dict):  # collections.UserDict
            template.data = {}
        else:
            template.clear()
        copy.copy(template)
    except Exception:  # it can be neither copied nor cleared
        return None
    return lambda: copy.copy(template)


def _flatten(parts: Parts) -> tuple[list[Any], _Kind]:
    return parts.values, parts.kind


def _flatten_with_keys(parts: Parts) -> tuple[list[Key], _Kind]:
    entry: Any = pytree.MappingKey if parts.kind.by_key else pytree.GetAttrKey
    return [(entry(n), v) for n, v in parts.as_dict().items()], parts.kind


def _unflatten(values: Any, kind: _Kind) -> Any:
    result = kind.empty()
    for name, value in zip(kind.names, values, strict=True):
        if kind.by_key:
            result[name] = value
        else:
            object.__setattr__(result, name, value)
    return result


pytree.register_pytree_node(
    Parts,
    _flatten,
    _unflatten,
    serialized_type_name="autopipe.Parts",
    flatten_with_keys_fn=_flatten_with_keys,
)
