"""Detect changes of a model's Python state, which a captured graph does not see.

A graph has the branches that were taken at capture, with plain numbers as constants. A later
change, such as another temperature, a replaced layer or a disabled adapter, would go unnoticed. So
the state that such decisions usually depend on is compared in every call; if it has changed, the
model is captured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import types
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autopipe.errors import CaptureError
from autopipe.passes.python_state import MODULE_INTERNALS, WeakIdentity, is_user_module
from autopipe.placement import unmarked

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Set

PLAIN: frozenset[type] = frozenset({int, float, bool, str, type(None), torch.dtype})
RECORDS = (types.SimpleNamespace, argparse.Namespace)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def model_state_key(model: nn.Module, names: Set[str] | None = None) -> Hashable:
    """Return a key of the state that capture depends on: it changes if that state does.

    The key has, for every module: the class; attributes (such as the training flag) that are plain
    values, tensors, or containers and configurations of those; hooks; which layers are at which
    names; shapes and dtypes of parameters and buffers, and which of them are the same tensor.

    Args:
        model: the user's module.
        names: the attributes of modules of users' own classes that count; None: all. (The code of
            torch's layers, also of derived ones, may read any attribute.)

    Raises:
        CaptureError: a parameter of a lazy layer has no shape yet, or a layer is of TorchScript.
    """
    numbers: dict[int, int] = {}  # of tensors and layers, by identity
    key: list[Any] = []
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise _script_error(model, module)
        attributes = unmarked(vars(module))
        kind: Any = type(module)
        key += kind, module.training
        counted = attributes.keys() - MODULE_INTERNALS
        if names is not None and _is_users(kind):
            counted &= names
        for name in counted:
            value = attributes[name]
            plain = type(value)
            if plain is float:
                key.append((name, _float_key(value)))
            elif plain in PLAIN:
                key.append((name, plain, value))  # 1 and True are equal
            else:
                key.append(name)
                key.extend(_attribute_key(name, value, seen))
        for name in HOOKS:
            if attributes[name]:
                key += map(WeakIdentity, attributes[name].values())
        if "forward" in attributes:
            key.append(WeakIdentity(attributes["forward"]))
        for name, layer in attributes["_modules"].items():  # one layer may be at several names
            key.append((name, numbers.setdefault(id(layer), len(numbers))))
        for registry in (attributes["_parameters"], attributes["_buffers"]):
            for name, tensor in registry.items():
                if tensor is not None:
                    if is_lazy(tensor):
                        raise _lazy_error(module, name)
                    number = numbers.setdefault(id(tensor), len(numbers))
                    key.append((name, number, tensor.shape, tensor.dtype))
    return tuple(key)


def _script_error(model: nn.Module, module: torch.jit.ScriptModule) -> CaptureError:
    path = next(name for name, m in model.named_modules() if m is module)
    return CaptureError(
        f"{'a part of the model' if path else 'the model'} is compiled by TorchScript: it has no"
        " Python code to capture",
        node=path or None,
        found=f"a {module.original_name}, as a {type(module).__name__}",
        remedy="use the module that torch.jit.script or torch.jit.trace was called with; its"
        " parameters can be loaded from the compiled one: module.load_state_dict("
        "compiled.state_dict())",
    )


def _lazy_error(module: nn.Module, name: str) -> CaptureError:
    return CaptureError(
        "a parameter has no shape yet: its layer has never been called",
        node=f"{type(module).__name__}.{name}",
        remedy="call the model itself once before the pipeline: model(*args)",
    )


def _float_key(value: float) -> Hashable:
    """1.0 and 1 are equal, and so are 0.0 and -0.0; nan is not equal to itself."""
    return float, str(value) if value == 0 or value != value else value


@functools.cache
def _is_users(kind: type) -> bool:
    """Whether nothing but `nn.Module` in a module's class is torch's."""
    bases = [c for c in kind.__mro__ if c not in (nn.Module, object, Generic)]
    return all(is_user_module(sys.modules.get(c.__module__)) for c in bases)


def _attribute_key(name: Any, value: Any, seen: set[int]) -> Iterator[Hashable]:
    """The key of an attribute; nothing for an object that is neither data nor a tensor.

    (A module may refer to its trainer, which changes all the time.)
    """
    if type(value) in PLAIN:
        yield name, _float_key(value) if type(value) is float else (type(value), value)
    elif isinstance(value, Tensor):
        yield name, WeakIdentity(value)  # the captured graph sees in-place changes
    elif id(value) in seen:
        return
    elif isinstance(value, dict):
        seen.add(id(value))
        for key, item in value.items():
            yield from _attribute_key((name, key), item, seen)
    elif isinstance(value, (list, tuple)):
        seen.add(id(value))
        yield name, len(value)
        for n, item in enumerate(value):
            yield from _attribute_key((name, n), item, seen)
    elif isinstance(value, RECORDS) or _is_configuration(value):
        seen.add(id(value))
        for key, item in vars(value).items():
            yield from _attribute_key((name, key), item, seen)


def _is_configuration(value: Any) -> bool:
    """Whether an object is a dataclass, or of a class that is named a configuration."""
    kind = type(value)
    named = dataclasses.is_dataclass(kind) or kind.__name__.endswith("Config")
    return named and hasattr(value, "__dict__")
