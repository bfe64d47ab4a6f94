"""Import ``MODULE:CALLABLE`` and call it for the model and its example inputs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autopipe.errors import OptionError
from autopipe.passes.capture import UserModel, is_model

if TYPE_CHECKING:
    from types import ModuleType

Target = tuple[UserModel, tuple[Any, ...], dict[str, Any]]

FILE = "__autopipe_model__"
"""The module name of an imported file: its own name may be taken (a file torch.py)."""


def load(name: str, *, real: bool = False) -> Target:
    """Import a module or file, look up a callable in it, and call it.

    Args:
        name: ``package.module:function`` or ``folder/file.py:function``; the function may be an
            attribute of something: ``module:Class.method``.
        real: do not call it under ``torch.device("meta")``.

    Returns:
        The model, args, kwargs.

    Raises:
        OptionError: there is no such module or callable, or it returns something else.
        Exception: whatever the user's module or callable raises.
    """
    where, colon, what = name.rpartition(":")
    if not colon or not where or not what:
        raise OptionError(
            "no callable is named",
            expected="MODULE:CALLABLE, such as models/gpt.py:training",
            found=repr(name),
        )
    module = _file(Path(where)) if where.endswith(".py") else _named(where)
    function: Any = module
    for part in what.split("."):
        if not hasattr(function, part):
            raise OptionError(f"{where} has no {what!r}", expected="a function without arguments")
        function = getattr(function, part)
    if not callable(function):
        raise OptionError(
            f"{name} cannot be called",
            expected="a function without arguments",
            found=type(function).__name__,
        )
    with nullcontext() if real else torch.device("meta"):
        return _checked(function(), name)


def _checked(found: Any, name: str) -> Target:
    model, *inputs = found if isinstance(found, tuple) and found else (None,)
    if is_model(model):
        match inputs:
            case [tuple(args)]:
                return model, args, {}
            case [dict(kwargs)]:
                return model, (), kwargs
            case [tuple(args), dict(kwargs)]:
                return model, args, kwargs
    kinds = [type(f).__name__ for f in found] if isinstance(found, tuple) else type(found).__name__
    raise OptionError(
        f"{name} returns something else than a model and its example inputs",
        expected="(model, args), (model, kwargs) or (model, args, kwargs)",
        found=", ".join(kinds) if isinstance(kinds, list) else kinds,
    )


def _named(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with `python -m`
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:  # its parent package does not exist
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        found = None
    except ValueError:  # an empty name, or one of a module without a spec
        found = None
    if found is None:
        raise OptionError(
            f"there is no module {name!r}",
            remedy="name a module that can be imported from here, or the path of a .py file",
        )
    return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise OptionError("there is no such file", found=str(path))
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as with `python file.py`
    spec = importlib.util.spec_from_file_location(FILE, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[FILE] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module
