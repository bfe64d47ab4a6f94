"""Snapshots of attributes, hooks and buffers: what a forward changed, and setting it back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autopipe.passes.capture.module_state import (
    Missing,
    changed_attributes,
    is_same,
    preserve_buffers,
    restore_values,
    set_attributes,
    snapshot_attributes,
)


def model() -> nn.Module:
    inner = nn.Linear(2, 2)
    inner.steps, inner.seen = 0, [1]  # type: ignore[assignment]
    inner.register_buffer("total", torch.zeros(2))
    return nn.Sequential(inner)


def test_nothing_changed() -> None:
    net = model()
    before = snapshot_attributes(net)
    net[0].weight.data.add_(1)  # type: ignore[index]
    net[0].total.add_(1)  # type: ignore[index]
    net.eval()
    assert changed_attributes(net, before) == []


def test_changes_are_named_and_set_back_and_forth() -> None:
    net = model()
    inner: Any = net[0]  # type: ignore[index]
    old = inner.total
    before = snapshot_attributes(net)
    inner.steps = 1
    inner.seen.append(2)
    inner.new = "here"
    inner.total = inner.total + 1
    inner.register_forward_hook(lambda *args: None)
    changed = changed_attributes(net, before)
    assert {str(c) for c in changed} == {
        *("0.steps", "0.seen", "0.new", "0.total", "0._forward_hooks")
    }
    assert [str(c) for c in changed if c.is_buffer] == ["0.total"]
    assert next(c for c in changed if c.name == "new").before is Missing
    set_attributes(changed, "before")
    assert (inner.steps, inner.seen, hasattr(inner, "new")) == (0, [1], False)
    assert inner.total is old
    assert not inner._forward_hooks
    assert changed_attributes(net, before) == []
    set_attributes(changed, "after")
    assert (inner.steps, inner.seen, inner.new) == (1, [1, 2], "here")
    assert len(inner._forward_hooks) == 1
    assert torch.equal(inner.total, torch.ones(2))


def test_attributes_of_torch_are_left_out() -> None:
    layer = nn.utils.spectral_norm(nn.Linear(2, 2))
    names = {name for _, name, is_buffer in snapshot_attributes(layer) if not is_buffer}
    assert names.isdisjoint({"_parameters", "_buffers", "_modules", "training", "weight"})


def test_buffers_are_preserved_by_object_name_and_order() -> None:
    net = model()
    inner: Any = net[0]  # type: ignore[index]
    inner.register_buffer("late", torch.ones(1), persistent=False)
    objects = dict(inner._buffers)
    with preserve_buffers(net):
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


def test_containers_are_the_same_if_their_objects_are() -> None:
    x = torch.ones(1)
    assert is_same({"a": [x, 1.5]}, {"a": [x, 1.5]})
    assert not is_same({"a": [x]}, {"a": [x.clone()]})
    assert not is_same([1], [True])
    assert not is_same([1], (1,))
