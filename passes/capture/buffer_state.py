"""Restore a model: its buffers' registries and values, the objects that are its attributes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


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


@contextmanager
def preserve_attributes(model: nn.Module) -> Iterator[None]:
    """On exit, restore every module's attributes: the same objects.

    (torch.export replaces containers by copies, of which the user's own references know nothing.)
    """
    saved = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, before in saved:
            attributes.update(before)


def restore_values(saved: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy saved values back into their tensors.

    Args:
        saved: (tensor, its saved value).
    """
    with torch.no_grad():
        for tensor, value in saved:
            tensor.copy_(value)
