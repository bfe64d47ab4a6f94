"""Load generated source code so that tracebacks and debuggers show it."""

from __future__ import annotations

import hashlib
import io
import linecache
from typing import Any


def load_source(source: str) -> tuple[dict[str, Any], str]:
    """Compile and execute a generated module.

    Args:
        source: its text.

    Returns:
        The module's names, and the file name under which `linecache` (and so every traceback and
        debugger) finds the text.
    """
    filename = f"<autopipe {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    # Lines end where Python ends them. `str.splitlines` would also end them at a form feed.
    lines = list(io.StringIO(source, newline="\n"))
    linecache.cache[filename] = (len(source), None, lines, filename)
    names: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), names)
    return names, filename


def unload_source(filename: str) -> None:
    """Forget the text of a generated module that is no longer used.

    Args:
        filename: as `load_source` returned it.
    """
    linecache.cache.pop(filename, None)
