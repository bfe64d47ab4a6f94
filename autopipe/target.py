"""Import ``MODULE:CALLABLE`` and call it for the model and its example inputs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autopipe.errors import AutopipeError, OptionError, describe
from autopipe.passes.capture import UserModel, is_model
from autopipe.passes.graph import is_user_file, user_source_line

if TYPE_CHECKING:
    from collections.abc import Iterator
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
        OptionError: there is no such module or callable, it fails, or it returns something else.
            What the user's code raised is the error's cause.
    """
    where, colon, what = name.rpartition(":")
    if not colon or not where or not what:
        raise OptionError(
            "no callable is named",
            expected="MODULE:CALLABLE, such as models/gpt.py:training",
            found=repr(name),
        )
    with _users_code(where):
        function: Any = _file(Path(where)) if where.endswith(".py") else _named(where)
    with _users_code(name):
        for part in what.split("."):
            if not hasattr(function, part):
                expected = "a function without arguments"
                raise OptionError(f"{where} has no {what!r}", expected=expected)
            function = getattr(function, part)
        if not callable(function):
            raise OptionError(
                f"{name} cannot be called",
                expected="a function without arguments",
                found=type(function).__name__,
            )
        with nullcontext() if real else torch.device("meta"):
            return _checked(function(), name)


@contextmanager
def _users_code(name: str) -> Iterator[None]:
    """Within this context, turn what the user's code raises into an error with its line."""
    try:
        yield
    except AutopipeError:
        raise
    except (Exception, SystemExit) as error:
        leaves = isinstance(error, SystemExit)
        raise OptionError(
            f"{name} leaves the program" if leaves else f"{name} fails",
            source=_line_of(error),
            found=describe(error),
            remedy="call it in Python to see the whole traceback",
        ) from error


def _line_of(error: BaseException) -> str | None:
    """The user's innermost line, as ``file:line``."""
    if isinstance(error, SyntaxError) and error.filename and is_user_file(error.filename):
        return f"{error.filename}:{error.lineno}"
    stack = traceback.extract_tb(error.__traceback__)
    libraries = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    own = [frame for frame in stack if not frame.filename.startswith(libraries)]
    return user_source_line(traceback.StackSummary.from_list(own)) or user_source_line(stack)


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
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as with `python -m`
    try:
        found = None if "" in name.split(".") else importlib.util.find_spec(name)
    except ModuleNotFoundError as error:  # its parent package does not exist
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        found = None
    except ValueError:
        if name in sys.modules:  # such as __main__; else its parent package raised it
            found = None
        else:
            raise
    if found is None:
        raise OptionError(
            f"there is no module {name!r}",
            remedy="name a module that can be imported from here, or the path of a .py file",
        )
    return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    if not os.path.isfile(path):  # `Path.is_file` raises if the name is too long
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
