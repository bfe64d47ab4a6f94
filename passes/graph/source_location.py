"""Find the user's source lines: those that are neither torch's nor autopipe's."""

from __future__ import annotations

import re
import traceback
import warnings
from pathlib import Path

import torch

TORCH = str(Path(torch.__file__).parent)
OURS = str(Path(__file__).parents[2])


def is_user_file(file: str) -> bool:
    """Whether a source file is neither torch's nor autopipe's."""
    return not file.startswith((TORCH, OURS, "<"))


def trim_to_user_frame(trace: str | None) -> str | None:
    """Drop the frames of a stack trace that are inside the user's innermost frame.

    It then ends at ``self.linear(x)``, not inside `torch.nn.Linear`.
    """
    frames = re.split(r'^\s*(?=File ")', trace or "", flags=re.MULTILINE)
    files = [re.match(r'File "(.+?)"', frame) for frame in frames]
    last = max((i for i, f in enumerate(files) if f and is_user_file(f.group(1))), default=None)
    return trace if last is None else "  ".join(["", *frames[1 : last + 1]])


def user_source_line(stack: traceback.StackSummary) -> str | None:
    """Return ``file:line`` of the innermost frame that is the user's, or None."""
    for frame in reversed(stack):
        if is_user_file(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return None


def warn_at_user_line(text: str) -> None:
    """Issue a warning that is shown at the user's own line."""
    file, _, line = (user_source_line(traceback.extract_stack()) or ":0").rpartition(":")
    warnings.warn_explicit(text, UserWarning, file, int(line))
