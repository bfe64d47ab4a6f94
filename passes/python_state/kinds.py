"""What kind of value or module something is, which decides how it is followed."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from autopipe.passes.graph import is_standard_library, is_user_file

from .holder_of import own_dict
from .value_keys import module_name

if TYPE_CHECKING:
    from types import FrameType

SHALLOW = (Tensor, bool, int, float, complex, str, bytes, type(None))
"""What refers to nothing."""


def is_shallow(value: Any) -> bool:
    """Whether a value refers to nothing; an object of a derived class may have attributes."""
    return isinstance(value, SHALLOW) and (isinstance(value, Tensor) or own_dict(value) is None)


def owner_of(value: Any) -> Any:
    """The object that a method of Python's own belongs to; of another value, the value itself."""
    return value.__self__ if isinstance(value, types.BuiltinMethodType) else value


def is_collection(value: Any) -> bool:
    """Whether this is a `UserDict`, a `ChainMap`, a `WeakSet` or the like."""
    return any(
        c.__module__ in ("collections", "weakref", "_weakrefset") for c in type(value).__mro__
    )


def is_torchs(value: Any) -> bool:
    """Whether an object is of a class of torch, such as an operator, and no layer."""
    root = module_name(type(value)).partition(".")[0]
    return root in ("torch", "numpy", "sympy") and not isinstance(value, nn.Module)


def is_user_module(module: Any) -> bool:
    """Whether a Python module is the user's or another library's, not torch's or Python's own."""
    if type(module) is not types.ModuleType:  # torch.ops.aten
        return False
    file = getattr(module, "__file__", None)
    if file is None:  # a notebook, python -c, one that was made by types.ModuleType: or built in
        root = module.__name__.partition(".")[0]
        package = sys.modules.get(root, module)
        made = module.__spec__ is None and root not in sys.builtin_module_names
        return made if package is module or root == module.__name__ else is_user_module(package)
    return is_user_file(file) and not is_standard_library(file)


def is_users_class(kind: type) -> bool:
    """Whether a class is of a Python module of the user's or of another library."""
    return is_user_module(sys.modules.get(kind.__module__))


def is_import(frame: FrameType) -> bool:
    """Whether this is the code of a Python module that is imported for the first time."""
    spec = frame.f_globals.get("__spec__")
    return frame.f_code.co_name == "<module>" and getattr(spec, "_initializing", False)


def is_imported_part(package: str, name: object, value: Any) -> bool:
    """Whether a variable of a package is its submodule, which an import sets there once."""
    return isinstance(value, types.ModuleType) and sys.modules.get(f"{package}.{name}") is value
