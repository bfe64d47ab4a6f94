"""Whose code a line is: the user's (and the libraries' that they use), torch's or ours."""

from __future__ import annotations

import re
import traceback
import warnings
from pathlib import Path

import torch

TORCH = str(Path(torch.__file__).parent)
OURS = str(Path(__file__).parents[2])


def is_user_file(file: str) -> bool:
    """A source file that is neither torch's nor ours."""
    return not file.startswith((TORCH, OURS, "<"))


def trim_to_user_frame(trace: str | None) -> str | None:
    """A stack trace without the frames below the user's innermost one.

    ``self.linear(x)`` is where a reader looks, not the inside of `torch.nn.Linear`.
    """
    frames = re.split(r'^\s*(?=File ")', trace or "", flags=re.MULTILINE)
    files = [re.match(r'File "(.+?)"', frame) for frame in frames]
    last = max((i for i, f in enumerate(files) if f and is_user_file(f.group(1))), default=None)
    return trace if last is None else "  ".join(["", *frames[1 : last + 1]])


def user_source_line(stack: traceback.StackSummary) -> str | None:
    """``file:line`` of the innermost frame that is neither torch's nor ours."""
    for frame in reversed(stack):
        if is_user_file(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return None


def warn_at_user_line(text: str) -> None:
    """A warning, shown at the user's own line."""
    file, _, line = (user_source_line(traceback.extract_stack()) or ":0").rpartition(":")
    warnings.warn_explicit(text, UserWarning, file, int(line))
