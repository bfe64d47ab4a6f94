"""Turn the errors of torch.export into short ones, with the line of the model."""

from __future__ import annotations

import linecache
import traceback

from autopipe.errors import CaptureError
from autopipe.passes.graph import user_source_line
from autopipe.passes.python_state import AVOIDING_OPTIONS


def explain(error: Exception) -> CaptureError:
    """Turn an error of torch.export into a short one with the line of the model."""
    source = user_source_line(traceback.extract_tb(error.__traceback__))
    kind, text = type(error).__name__, str(error)
    first = next((line for line in text.splitlines() if line.strip()), kind)
    if source is not None:
        file, _, number = source.rpartition(":")
        first = f"{linecache.getline(file, int(number)).strip()}  ({first})"
    if "DataDependent" in kind or "data-dependent" in text.lower():
        return CaptureError(
            "control flow that depends on the values of tensors cannot be captured",
            source=source,
            found=first,
            remedy="compute both branches and select with torch.where, or decide outside of the"
            f" model and pass the decision in as a Python value; {AVOIDING_OPTIONS}",
        )
    return CaptureError(
        "torch.export cannot capture the model",
        source=source,
        found=f"{kind}: {first}",
        remedy="check that the model itself runs on these inputs; if it does, make"
        " torch.export.export(model, args, kwargs, strict=False) work first (its error is the cause"
        " of this one)",
    )
