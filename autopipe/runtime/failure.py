"""Turn an exception inside generated code into an error that says where it happened."""

from __future__ import annotations

import linecache
import re
import traceback
from typing import TYPE_CHECKING

import torch

from autopipe.errors import AutopipeError, StageError, describe, text_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from .transfer import WorkerDevice

NODE = re.compile(r"^\s+(\w+)(?::\s*\".*?\")? = ")
"""A line of generated code that computes a node; group 1: its name."""

STAGE_FUNCTION = re.compile(r"^(?:forward|recompute|gradients|weights|backward)_(\d+)$")
"""Name of the generated function that runs one micro-batch at one stage; group 1: the stage."""

SOURCE = re.compile(r"\s+# File: (.+?:\d+) in ")
"""The comment above generated lines that names the line of the model that they come from."""

DTYPE = re.compile(r"\bdtype|scalar type")
"""In the text of an exception that is about dtypes."""

DTYPES = (
    "give classes as torch.long, and data in the dtype of the parameters, or call the pipeline"
    " under torch.autocast; "
)


ASYNCHRONOUS = (
    "the device reports an error some time after the kernel that failed, which may be one of any"
    " stage, or one before this call: run again{}, and the error names the op; after an error of"
    " this kind the device cannot be used: restart the process"
)
"""What to do about a failed kernel, such as one that found an index out of range."""


def stage_error(
    error: Exception, filename: str, direction: str, workers: Sequence[WorkerDevice] = ()
) -> Exception:
    """Describe where in a generated program an exception was raised.

    Args:
        error: the exception. Its frames are cleared, so that they do not keep tensors alive.
        filename: of the generated program.
        direction: "forward" or "backward".
        workers: of the stages.

    Returns:
        A `StageError` with stage, micro-batch, phase, node and source line as far as the traceback
        shows them; an `AutopipeError` is returned as it is.
    """
    stage = microbatch = node = source = phase = None
    frame: TracebackType | None = error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if code.co_filename == filename:
            function = STAGE_FUNCTION.match(code.co_name)
            if function:
                stage = int(function.group(1))
                microbatch = frame.tb_frame.f_locals.get("m")
            elif stage is None:
                copied = frame.tb_next.tb_frame if frame.tb_next is not None else None
                if copied is not None and copied.f_code.co_name in ("offload", "fetch"):
                    stage, microbatch = copied.f_locals.get("stage"), copied.f_locals.get("m")
            else:
                phase = code.co_name.split("_")[0]
                node, source = _node_at(filename, frame.tb_lineno)
        frame = frame.tb_next
    traceback.clear_frames(error.__traceback__)
    if isinstance(error, AutopipeError):
        return error
    where = f"stage {stage}, micro-batch {microbatch}" if stage is not None else f"the {direction}"
    return StageError(
        f"{where} failed: {describe(error)}",
        stage=stage,
        microbatch=microbatch,
        phase=phase,
        node=node,
        source=source,
        remedy=_remedy(error, workers),
    )


def _remedy(error: Exception, workers: Sequence[WorkerDevice]) -> str:
    """What the user can do about an exception."""
    if isinstance(error, torch.AcceleratorError):
        variables = filter(None, (w.backend.blocking_launches for w in workers))
        return ASYNCHRONOUS.format("".join(f" with {v}" for v in dict.fromkeys(variables)))
    dtypes = DTYPES if DTYPE.search(text_of(error)) else ""
    return (
        f"{dtypes}the original exception is the cause of this one; the pipeline can be called again"
    )


def _node_at(filename: str, line: int) -> tuple[str | None, str | None]:
    """The node that a line of generated code computes, and the line of the model it comes from."""
    match = NODE.match(linecache.getline(filename, line))
    source = None
    for above in range(line - 1, 0, -1):
        text = linecache.getline(filename, above)
        if text.startswith("def "):
            break
        found = SOURCE.match(text)
        if found:
            source = found.group(1)
            break
    return (match.group(1) if match else None), source
