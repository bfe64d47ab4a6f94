"""What Python may have decided by while a model was captured.

A graph holds the branches that were taken: a temperature that is a plain number, a layer that was
exchanged later, an adapter that was switched off. What such decisions usually go by is compared in
every call; if it changed, the model is captured anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import nn

PLAIN: frozenset[type] = frozenset({int, float, bool, str, type(None), torch.dtype})
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def configuration(model: nn.Module) -> Hashable:
    """A value that is equal as long as nothing that capture depends on has changed.

    For every module: its class, its attributes that are plain values or lists of them (the
    training flag is one), its hooks, the looks of its tensors and which of them are one.
    """
    numbers: dict[int, int] = {}
    rows: list[Any] = []
    for module in model.modules():
        facts = vars(module)
        rows.append(type(module))
        for name, value in facts.items():
            kind = type(value)
            if kind in PLAIN:
                rows.append((name, value))
            elif (kind is list or kind is tuple) and all(type(v) in PLAIN for v in value):
                rows.append((name, tuple(value)))
        rows += [id(hook) for name in HOOKS for hook in facts[name].values()]
        rows.append(id(facts.get("forward")))
        for registry in (facts["_parameters"], facts["_buffers"]):
            for name, tensor in registry.items():
                if tensor is not None:
                    number = numbers.setdefault(id(tensor), len(numbers))
                    rows.append((name, number, tensor.shape, tensor.dtype))
    return tuple(rows)
