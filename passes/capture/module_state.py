"""Snapshots of a model's Python state: attributes, forward hooks and buffers of its modules.

torch.export traces a model by calling its forward, which may change attributes. These functions
record what a call changed (`snapshot_attributes`, `changed_attributes`) and restore it
(`set_attributes`, `preserve_buffers`, `restore_values`).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Snapshot = dict[tuple[str, str, bool], Any]

PLAIN_TYPES = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)

MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs"}
"""Attributes that torch sets in a module: parameters, hooks, flat copies of recurrent weights."""

HOOK_REGISTRIES = ("_forward_pre_hooks", "_forward_hooks")
"""Hook registries, which are compared too: a forward may register hooks and set a flag for that."""


class Missing:
    """The value of an attribute that does not exist."""


class Attribute(NamedTuple):
    """An attribute or buffer of one module, before and after a forward.

    Attributes:
        path: qualified name of the module; "" for the model itself.
        module: the module.
        name: name of the attribute.
        is_buffer: whether it is a registered buffer.
        before: its value before the forward; `Missing` if there was none.
        after: its value after the forward; `Missing` if there is none.
    """

    path: str
    module: nn.Module
    name: str
    is_buffer: bool
    before: Any
    after: Any

    @property
    def holder(self) -> dict[str, Any]:
        """The dict that stores the attribute."""
        return self.module._buffers if self.is_buffer else vars(self.module)

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def snapshot_attributes(model: nn.Module) -> Snapshot:
    """The attributes of all modules, their forward hooks and buffers.

    Containers are copied, the objects in them are not. torch's own attributes are left out.

    Returns:
        (module path, attribute name, whether it is a buffer) → value.
    """
    hooks = {
        (path, name, False): dict(vars(module)[name])
        for path, module in model.named_modules()
        for name in HOOK_REGISTRIES
        if name in vars(module)
    }
    return hooks | {
        (path, name, holder is module._buffers): pytree.tree_map(lambda x: x, value)
        for path, module in model.named_modules()
        for holder in (vars(module), module._buffers)
        for name, value in holder.items()
        if name not in MODULE_INTERNALS
        and not isinstance(value, nn.Module)
        and not _set_by_torch_hook(module, name)
    }


def _set_by_torch_hook(module: nn.Module, name: str) -> bool:
    """Whether weight norm, spectral norm or pruning sets this weight before every call."""
    return f"{name}_orig" in module._parameters or f"{name}_g" in module._parameters


def changed_attributes(model: nn.Module, before: Snapshot) -> list[Attribute]:
    """The attributes that differ from an earlier `snapshot_attributes`."""
    modules = dict(model.named_modules())
    after = snapshot_attributes(model)
    return [
        Attribute(key[0], modules[key[0]], *key[1:], old, new)
        for key in {**before, **after}
        if key[0] in modules
        and not is_same(old := before.get(key, Missing), new := after.get(key, Missing))
    ]


def set_attributes(changed: Iterable[Attribute], which: str) -> None:
    """Set attributes to their values "before" or "after" the forward.

    Args:
        changed: the attributes.
        which: "before" or "after".
    """
    for item in changed:
        value = getattr(item, which)
        if item.name in HOOK_REGISTRIES:  # in place: a hook's handle refers to the registry
            item.holder[item.name].clear()
            item.holder[item.name].update(value)
        elif value is Missing:
            item.holder.pop(item.name, None)
        else:
            item.holder[item.name] = pytree.tree_map(lambda x: x, value)


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """On exit, restore every module's buffer registry: objects, names and order (not values)."""
    saved: list[tuple[Any, Any]] = [
        (registry, registry.copy())
        for module in model.modules()
        if isinstance(module._buffers, dict)  # a scripted module has no Python state
        for registry in (module._buffers, module._non_persistent_buffers_set)
    ]
    try:
        yield
    finally:
        for registry, content in saved:
            registry.clear()
            registry.update(content)


def restore_values(saved: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy saved values back into their tensors.

    Args:
        saved: (tensor, its saved value).
    """
    with torch.no_grad():
        for tensor, value in saved:
            tensor.copy_(value)


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are equal plain data, or containers of the same objects."""
    (left, spec), (right, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec == other and all(map(_is_same_leaf, left, right))


def _is_same_leaf(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN_TYPES) and bool(a == b))
