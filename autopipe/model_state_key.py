"""What Python may have decided by while a model was captured.

A graph holds the branches that were taken: a temperature that is a plain number, a layer that was
exchanged later, an adapter that was switched off. What such decisions usually go by is compared in
every call; if it changed, the model is captured anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autopipe.errors import CaptureError
from autopipe.passes.capture import MODULE_INTERNALS

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

PLAIN: frozenset[type] = frozenset({int, float, bool, str, type(None), torch.dtype})
RECORDS = (types.SimpleNamespace, argparse.Namespace)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def model_state_key(model: nn.Module) -> Hashable:
    """A value that is equal as long as nothing that capture depends on has changed.

    For every module: its class, its attributes (the training flag is one) as far as they are plain
    values, tensors, or containers and configurations of those; its hooks; the looks of its
    parameters and buffers and which of them are one.

    Raises:
        CaptureError: a parameter of a lazy layer has no shape yet.
    """
    numbers: dict[int, int] = {}
    rows: list[Any] = []
    known: set[int] = set()
    for module in model.modules():
        facts = vars(module)
        rows.append(type(module))
        for name, value in facts.items():
            if type(value) in PLAIN:
                rows.append((name, value))
            elif name not in MODULE_INTERNALS:
                rows.extend(_facts(name, value, known))
        rows += [id(hook) for name in HOOKS for hook in facts[name].values()]
        rows.append(id(facts.get("forward")))
        for registry in (facts["_parameters"], facts["_buffers"]):
            for name, tensor in registry.items():
                if tensor is not None:
                    if is_lazy(tensor):
                        raise _shapeless(module, name)
                    number = numbers.setdefault(id(tensor), len(numbers))
                    rows.append((name, number, tensor.shape, tensor.dtype))
    return tuple(rows)


def _shapeless(module: nn.Module, name: str) -> CaptureError:
    return CaptureError(
        "a parameter has no shape yet: its layer has never been called",
        node=f"{type(module).__name__}.{name}",
        remedy="call the model itself once before the pipeline: model(*args)",
    )


def _facts(name: Any, value: Any, known: set[int]) -> Iterator[Hashable]:
    """What an attribute holds; of an object that is neither data nor a tensor, nothing.

    (A module may well hold its trainer, which changes all the time.)
    """
    if type(value) in PLAIN:
        yield name, value
    elif isinstance(value, Tensor):
        yield name, id(value)  # what is written to it in place, a captured model sees
    elif id(value) in known:
        return
    elif isinstance(value, dict):
        known.add(id(value))
        for key, item in value.items():
            yield from _facts((name, key), item, known)
    elif isinstance(value, (list, tuple)):
        known.add(id(value))
        yield name, len(value)
        for n, item in enumerate(value):
            yield from _facts((name, n), item, known)
    elif isinstance(value, RECORDS) or _is_configuration(value):
        known.add(id(value))
        for key, item in vars(value).items():
            yield from _facts((name, key), item, known)


def _is_configuration(value: Any) -> bool:
    """A dataclass, or what a library calls a configuration."""
    kind = type(value)
    named = dataclasses.is_dataclass(kind) or kind.__name__.endswith("Config")
    return named and hasattr(value, "__dict__")
