"""What can hold Python values: attributes, variables, containers; how to read and restore each.

A `Holder` reads its values into a dict, which is a copy: the values of a namespace by name, those
of a dict by key, the content of a sequence or set as a whole (by the key `CONTENT`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .value_keys import raw_dict

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping

CONTENT = "content"

LARGEST_CONTAINER = 2000
"""Entries of a container that are compared; of a larger one, only their number."""


MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs"}
"""Attributes that torch sets in a module: parameters, hooks, flat copies of recurrent weights."""


REGISTRIES = {
    "_buffers": "buffer",
    "_parameters": "parameter",
    "_modules": "module",
    "_forward_pre_hooks": "hook",
    "_forward_hooks": "hook",
}
"""Registries of a module → what they hold. (A forward may register hooks and set a flag for it.)"""


class Missing:
    """The value of a name that does not exist."""


class TooLarge:
    """Stands for contents that are too large to be compared."""


@dataclass(eq=False)
class Holder:
    """Something that holds Python values.

    Attributes:
        owner: the object itself.
        label: what messages call it; "" for the model itself.
        kind: what its values are: "attribute", or "buffer", "parameter", "module" or "hook" of a
            module.
        is_changed: whether what the forward changes of it is looked for.
    """

    owner: Any
    label: str
    kind = "attribute"
    is_changed = True

    def read(self) -> dict[Hashable, Any]:
        """Copy the values."""
        raise NotImplementedError

    def write(self, key: Hashable, value: Any) -> None:
        """Set one value; `Missing` removes it."""
        raise NotImplementedError

    def get(self, key: Hashable) -> Any:
        """Read one value; `Missing` if there is none."""
        return self.read().get(key, Missing)

    def present(self) -> Collection[Hashable]:
        """The names of what exists, in order; nothing where there is always the same."""
        return ()

    def name_of(self, key: Hashable) -> str:
        """What messages call one of the values."""
        return f"{self.label}.{key}" if self.label else str(key)


class Namespace(Holder):
    """Variables of a Python module (its globals), or the attributes of an object."""

    def _names(self) -> Mapping[Any, Any]:
        names: Mapping[Any, Any] = vars(self.owner)
        return names

    def read(self) -> dict[Hashable, Any]:
        return dict(self._names())

    def get(self, key: Hashable) -> Any:
        return self._names().get(key, Missing)

    def present(self) -> Collection[Hashable]:
        return self._names().keys()

    def write(self, key: Hashable, value: Any) -> None:
        names: Any = self._names()
        if value is Missing:
            names.pop(key, None)
        else:
            names[key] = value


class Globals(Namespace):
    """Some variables of a Python module.

    Args:
        owner: its globals.
        label: the module's name.
        names: the variables that the code uses.
    """

    def __init__(self, owner: dict[str, Any], label: str) -> None:
        super().__init__(owner, label)
        self.names: set[str] = set()
        self._ordered: list[str] = []

    def _names(self) -> Mapping[Any, Any]:
        names: dict[str, Any] = self.owner
        return names

    def read(self) -> dict[Hashable, Any]:
        return {n: self.owner[n] for n in self.names if n in self.owner}

    def present(self) -> Collection[Hashable]:
        if len(self._ordered) != len(self.names):
            self._ordered = sorted(self.names)
        return [n for n in self._ordered if n in self.owner]


class Registry(Namespace):
    """A module's buffers, parameters, submodules or hooks.

    Args:
        owner: the registry.
        label: path of the module.
        kind: of the entries.
    """

    def __init__(self, owner: dict[Any, Any], label: str, kind: str) -> None:
        super().__init__(owner, label)
        self.kind = kind

    def _names(self) -> Mapping[Any, Any]:
        registry: dict[Any, Any] = self.owner
        return registry


class ModuleAttributes(Namespace):
    """The attributes of an `nn.Module`, without torch's own and those that torch's hooks set."""

    def read(self) -> dict[Hashable, Any]:
        return {
            name: value
            for name, value in vars(self.owner).items()
            if name not in MODULE_INTERNALS
            and not isinstance(value, nn.Module)
            and not _set_by_torch_hook(self.owner, name)
        }

    def present(self) -> Collection[Hashable]:
        """Nothing: which attributes a module has is compared by the key of the model's state."""
        return ()


def _set_by_torch_hook(module: nn.Module, name: str) -> bool:
    """Whether weight norm, spectral norm or pruning sets this weight before every call."""
    return f"{name}_orig" in module._parameters or f"{name}_g" in module._parameters


class Slots(Holder):
    """The attributes of an object that has slots."""

    def present(self) -> Collection[Hashable]:
        return [n for n in slots_of(self.owner) if hasattr(self.owner, n)]

    def read(self) -> dict[Hashable, Any]:
        return {n: getattr(self.owner, n) for n in slots_of(self.owner) if hasattr(self.owner, n)}

    def write(self, key: Hashable, value: Any) -> None:
        if value is Missing:
            object.__delattr__(self.owner, str(key))
        else:
            object.__setattr__(self.owner, str(key), value)


class ClassAttributes(Namespace):
    """The attributes of a class."""

    def write(self, key: Hashable, value: Any) -> None:
        if value is Missing:
            delattr(self.owner, str(key))
        else:
            setattr(self.owner, str(key), value)


class Dict(Holder):
    """A dict."""

    def read(self) -> dict[Hashable, Any]:
        if len(self.owner) > LARGEST_CONTAINER:
            return {CONTENT: (TooLarge, len(self.owner))}
        return raw_dict(self.owner)

    def get(self, key: Hashable) -> Any:
        if key == CONTENT:
            return self.read().get(key, Missing)
        return dict.get(self.owner, key, Missing)

    def present(self) -> Collection[Hashable]:
        large = len(self.owner) > LARGEST_CONTAINER
        return () if large else [*dict.keys(self.owner)]

    def write(self, key: Hashable, value: Any) -> None:
        if key == CONTENT and key not in self.owner:
            return  # it was not copied
        if value is Missing:
            self.owner.pop(key, None)
        else:
            self.owner[key] = value

    def name_of(self, key: Hashable) -> str:
        return f"{self.label}[{key!r}]" if self.label else f"[{key!r}]"


class Sequence(Holder):
    """A list, deque or set."""

    def read(self) -> dict[Hashable, Any]:
        if len(self.owner) > LARGEST_CONTAINER:
            return {CONTENT: (TooLarge, len(self.owner))}
        return {CONTENT: tuple(self.owner)}

    def write(self, key: Hashable, value: Any) -> None:
        """Refill it, unless it was too large to be copied."""
        if value[:1] == (TooLarge,):
            return
        self.owner.clear()
        (self.owner.update if isinstance(self.owner, set) else self.owner.extend)(value)

    def name_of(self, key: Hashable) -> str:
        return self.label


class Cell(Holder):
    """A variable of an enclosing function."""

    def read(self) -> dict[Hashable, Any]:
        try:
            return {CONTENT: self.owner.cell_contents}
        except ValueError:  # it is empty
            return {}

    def present(self) -> Collection[Hashable]:
        return [*self.read()]

    def write(self, key: Hashable, value: Any) -> None:
        if value is Missing:
            del self.owner.cell_contents
        else:
            self.owner.cell_contents = value

    def name_of(self, key: Hashable) -> str:
        return self.label


class Context(Cell):
    """A context variable."""

    def read(self) -> dict[Hashable, Any]:
        try:
            return {CONTENT: self.owner.get()}
        except LookupError:  # it has neither a value nor a default
            return {CONTENT: Missing}

    def write(self, key: Hashable, value: Any) -> None:
        if value is not Missing:
            self.owner.set(value)


def slots_of(value: Any) -> list[str]:
    """Names of the slots that an object's class and its bases define."""
    found: list[str] = []
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return [
        f"_{type(value).__name__.lstrip('_')}{n}"
        if n.startswith("__") and not n.endswith("__")
        else n
        for n in found
        if n not in ("__dict__", "__weakref__")
    ]
