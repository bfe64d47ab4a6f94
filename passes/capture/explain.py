"""Turn the errors of torch.export into short ones, with the line of the model."""

from __future__ import annotations

import linecache
import os
import traceback
from typing import TYPE_CHECKING

from autopipe.errors import CaptureError, text_of
from autopipe.passes.graph import user_source_line

from .failures import reason_for

if TYPE_CHECKING:
    from autopipe.passes.ir import Input

DISTRIBUTIONS = os.path.join("torch", "distributions")


def explain(error: Exception) -> CaptureError:
    """Turn an error of torch.export into a short one with the line of the model.

    If no line of the model is known (the layers are torch's own), it is the line of the call.
    """
    frames = traceback.extract_tb(error.__traceback__)
    source, code = user_source_line(frames), ""
    kind, text = type(error).__name__, text_of(error)
    first = next((line for line in text.splitlines() if line.strip()), kind)
    if source is not None and source.startswith("<"):  # code that torch generates
        source = None
    if source is not None:
        file, _, number = source.rpartition(":")
        code = linecache.getline(file, int(number)).strip()
    found = f"{code}  ({first})" if code else first
    if any(DISTRIBUTIONS in frame.filename for frame in frames) and "Guard" in kind:
        return CaptureError(
            "a distribution checks its parameters, which depend on the values of tensors",
            source=source,
            found=found,
            remedy="leave out validate_args=True (what is not said is not checked), or pass"
            " validate_args=False",
        )
    reason = reason_for(f"{kind}: {text}", code)
    data_dependent = "DataDependent" in kind or "data-dependent" in text.lower()
    return CaptureError(
        reason.problem,
        source=source or user_source_line(traceback.extract_stack()),
        found=found if data_dependent else f"{kind}: {found}",
        remedy=reason.remedy,
    )


def fixed_size_error(item: Input, fixed_at: str | None) -> CaptureError:
    """The error for a model that makes its batch dimension a constant.

    Args:
        item: the input of the call.
        fixed_at: the line of the model that does it; None: an operator does.
    """
    shape = ", ".join(map(str, item.spec.shape)) + "," * (len(item.spec.shape) == 1)
    scalar_loop = (
        "take sizes from x.shape, not from len(x), and do not loop over the batch sample by sample"
        " (for, list, unbind)"
    )
    no_batch = (
        f"dimension {item.batch_dim} of each input holds its samples. One sample without it gets it"
        " by x.unsqueeze(0); if samples are in another dimension, say so with in_dims=1 (nn.LSTM"
        " without batch_first); in the forward, write x.shape[0] instead of a number:"
        " x.view(x.shape[0], -1)"
    )
    return CaptureError(
        "the model fixes the size of its batch dimension",
        node=item.name,
        source=fixed_at or user_source_line(traceback.extract_stack()),
        expected=f"any size in dimension {item.batch_dim}",
        found=f"always {item.spec.shape[item.batch_dim or 0]}, in a tensor of ({shape})",
        remedy=f"{no_batch if fixed_at is None else scalar_loop}; if this input is not batched, say"
        " so with in_dims (None for it); an ExportedProgram must be exported with a dynamic batch"
        " dimension",
    )
