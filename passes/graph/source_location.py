"""Find the user's source lines: those that are neither torch's nor autopipe's."""

from __future__ import annotations

import re
import sysconfig
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TORCH = tuple(
    f"{Path(str(spec.origin)).parent}/"
    for spec in map(find_spec, ("torch", "numpy", "sympy", "mpmath"))
    if spec is not None
)
"""Where torch is, and what it computes with."""

OURS = str(Path(__file__).parents[2]) + "/"
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"] + "/"
GENERATED = ("<autopipe ", "<eval_with_key>", "<frozen ", "<generated", "<__array_function__")
"""Beginnings of the names of generated code. The user's own code may have such a name too:
``<string>`` (python -c), ``<stdin>``, ``<ipython-input-1>``."""


def is_user_file(file: str) -> bool:
    """Whether a source file is neither torch's nor autopipe's."""
    return not file.startswith((*TORCH, OURS, *GENERATED))


def is_own_file(file: str) -> bool:
    """Whether a source file is autopipe's."""
    return file.startswith(OURS)


def is_standard_library(file: str) -> bool:
    """Whether a source file belongs to Python's own library."""
    return file.startswith(STANDARD_LIBRARY) and "site-packages" not in file


def trim_to_user_frame(trace: str | None) -> str | None:
    """Drop the frames of a stack trace that are inside the user's innermost frame.

    It then ends at ``self.linear(x)``, not inside `torch.nn.Linear`.
    """
    frames = re.split(r'^\s*(?=File ")', trace or "", flags=re.MULTILINE)
    files = [re.match(r'File "(.+?)"', frame) for frame in frames]
    last = max((i for i, f in enumerate(files) if f and is_user_file(f.group(1))), default=None)
    return trace if last is None else "  ".join(["", *frames[1 : last + 1]])


def user_source_line(stack: traceback.StackSummary) -> str | None:
    """Return ``file:line`` of the innermost frame that is the user's, or None.

    A frame of ``<string>`` or ``<stdin>`` counts only if there is no other: libraries generate code
    of that name, too.
    """
    nearest = None
    for frame in reversed(stack):
        if not is_user_file(frame.filename) or is_standard_library(frame.filename):
            continue
        if frame.filename not in ("<string>", "<stdin>"):
            return f"{frame.filename}:{frame.lineno}"
        nearest = nearest or f"{frame.filename}:{frame.lineno}"
    return nearest


def line_of(function: Any) -> str | None:
    """Return ``file:line`` of where a callable is written; None if it is not Python's.

    Args:
        function: a function, a method, or an object that can be called.
    """
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return None if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def warn_at_user_line(text: str) -> None:
    """Issue a warning that is shown at the user's own line."""
    file, _, line = (user_source_line(traceback.extract_stack()) or ":0").rpartition(":")
    warnings.warn_explicit(text, UserWarning, file, int(line))
