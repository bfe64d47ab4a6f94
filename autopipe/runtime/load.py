"""Load generated source code so that tracebacks and debuggers show it."""

from __future__ import annotations

import hashlib
import io
import linecache
import weakref
from collections import Counter
from types import FunctionType
from typing import Any

_USERS: Counter[str] = Counter()
"""How many loaded programs have a text."""


def load_source(source: str) -> tuple[dict[str, Any], str]:
    """Compile and execute a generated module.

    Args:
        source: its text.

    Returns:
        The module's names, and the file name under which `linecache` (and so every traceback and
        debugger) finds the text, for as long as one of the module's functions lives.
    """
    filename = f"<autopipe {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    # Lines end where Python ends them. `str.splitlines` would also end them at a form feed.
    lines = list(io.StringIO(source, newline="\n"))
    linecache.cache[filename] = (len(source), None, lines, filename)
    names: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), names)
    function = next((f for f in names.values() if isinstance(f, FunctionType)), None)
    if function is not None:  # which refers to all others
        _forget_with(function, filename)
    return names, filename


def _forget_with(function: FunctionType, filename: str) -> None:
    """Forget the text when the last program that has it is freed."""
    _USERS[filename] += 1
    weakref.finalize(function, _forget, filename).atexit = False


def _forget(filename: str) -> None:
    _USERS[filename] -= 1
    if not _USERS[filename]:
        del _USERS[filename]
        linecache.cache.pop(filename, None)
