"""From an exception inside generated code to an error that says where it happened."""

from __future__ import annotations

import linecache
import re
import traceback
from typing import TYPE_CHECKING

from autopipe.errors import AutopipeError, StageError

if TYPE_CHECKING:
    from types import TracebackType

NODE = re.compile(r"^\s+(\w+)(?::\s*\".*?\")? = ")
GLUE = re.compile(r"^(forward|backward)_(\d+)$")
SOURCE = re.compile(r"# File: (.+?:\d+) in")


def explain(error: Exception, filename: str, way: str) -> Exception:
    """A `StageError` that names stage, micro-batch and node; the frames' tensors are let go."""
    stage = microbatch = node = source = phase = None
    frame: TracebackType | None = error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if code.co_filename == filename:
            glue = GLUE.match(code.co_name)
            if glue:
                stage = int(glue.group(2))
                microbatch = frame.tb_frame.f_locals.get("m")
            elif stage is not None:
                phase = code.co_name.split("_")[0]
                node, source = _at(filename, frame.tb_lineno)
        frame = frame.tb_next
    traceback.clear_frames(error.__traceback__)
    if isinstance(error, AutopipeError):
        return error
    where = f"stage {stage}, micro-batch {microbatch}" if stage is not None else f"the {way}"
    first = next(iter(str(error).splitlines()), "")
    return StageError(
        f"{where} failed: {type(error).__name__}: {first}",
        stage=stage,
        microbatch=microbatch,
        phase=phase,
        node=node,
        source=source,
        remedy="the original exception is the cause of this one; the pipeline can be called again",
    )


def _at(filename: str, line: int) -> tuple[str | None, str | None]:
    """The node that a line of generated source computes, and the model's line behind it."""
    match = NODE.match(linecache.getline(filename, line))
    source = None
    for above in range(line - 1, 0, -1):
        text = linecache.getline(filename, above)
        if text.startswith("def "):
            break
        found = SOURCE.search(text)
        if found:
            source = found.group(1)
            break
    return (match.group(1) if match else None), source
