"""Turn the errors of torch.export into short ones, with the line of the model."""

from __future__ import annotations

import linecache
import os
import traceback

from autopipe.errors import CaptureError, text_of
from autopipe.passes.graph import user_source_line
from autopipe.passes.python_state import AVOIDING_OPTIONS

DISTRIBUTIONS = os.path.join("torch", "distributions")


def explain(error: Exception) -> CaptureError:
    """Turn an error of torch.export into a short one with the line of the model."""
    frames = traceback.extract_tb(error.__traceback__)
    source = user_source_line(frames)
    kind, text = type(error).__name__, text_of(error)
    first = next((line for line in text.splitlines() if line.strip()), kind)
    if source is not None:
        file, _, number = source.rpartition(":")
        first = f"{linecache.getline(file, int(number)).strip()}  ({first})"
    if any(DISTRIBUTIONS in frame.filename for frame in frames) and "Guard" in kind:
        return CaptureError(
            "a distribution checks its parameters, which depend on the values of tensors",
            source=source,
            found=first,
            remedy="leave out validate_args=True (what is not said is not checked), or pass"
            " validate_args=False",
        )
    if "_CachedForward" in text:  # of torch.jit, from a ScriptModule whose class is replaced
        return CaptureError(
            "the forward calls a module of TorchScript: it has no Python code to capture",
            source=source,
            found=first,
            remedy="use the module that torch.jit.script or torch.jit.trace was called with",
        )
    if "DataDependent" in kind or "data-dependent" in text.lower():
        return CaptureError(
            "control flow that depends on the values of tensors cannot be captured",
            source=source,
            found=first,
            remedy="compute both branches and select with torch.where, or decide outside of the"
            " model and pass the decision in as a Python value; a check that only raises or asserts"
            f" may stay (not in a try, or before Python 3.11); {AVOIDING_OPTIONS}",
        )
    return CaptureError(
        "torch.export cannot capture the model",
        source=source,
        found=f"{kind}: {first}",
        remedy="check that the model itself runs on these inputs; if it does, make"
        " torch.export.export(model, args, kwargs, strict=False) work first (its error is the cause"
        " of this one)",
    )
