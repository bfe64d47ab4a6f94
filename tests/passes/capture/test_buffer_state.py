"""Registries and values of buffers, as they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autopipe.passes.capture.buffer_state import preserve_buffers, restore_values


def test_buffers_are_preserved_by_object_name_and_order() -> None:
    inner: Any = nn.Linear(2, 2)
    inner.register_buffer("total", torch.zeros(2))
    inner.register_buffer("late", torch.ones(1), persistent=False)
    objects = dict(inner._buffers)
    with preserve_buffers(nn.Sequential(inner)):
        del inner.total
        inner.total = torch.ones(2)
        inner.register_buffer("more", torch.ones(1), persistent=False)
    assert list(inner._buffers) == list(objects)
    assert all(inner._buffers[n] is x for n, x in objects.items())
    assert inner._non_persistent_buffers_set == {"late"}


def test_values_are_copied_back_into_their_tensors() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    saved = [(x, x.detach().clone())]
    with torch.no_grad():
        x.mul_(3)
    restore_values(saved)
    assert torch.equal(x, torch.ones(2))
    assert x.is_leaf
