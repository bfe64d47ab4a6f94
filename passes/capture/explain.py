"""Turn the errors of torch.export into short ones, with the line of the model."""

from __future__ import annotations

import linecache
import os
import traceback

from torch import Tensor, nn

from autopipe.errors import CaptureError, text_of
from autopipe.passes.graph import user_source_line
from autopipe.passes.python_state import AVOIDING_OPTIONS

DISTRIBUTIONS = os.path.join("torch", "distributions")


def explain(error: Exception, model: nn.Module) -> CaptureError:
    """Turn an error of torch.export into a short one with the line of the model.

    Args:
        error: what torch.export raised.
        model: which it was to capture.
    """
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
    own = weights_of_own_class(model)
    if own:
        return own_class_error(*next(iter(own.items())), source, f"{kind}: {first}")
    return CaptureError(
        "torch.export cannot capture the model",
        source=source,
        found=f"{kind}: {first}",
        remedy="check that the model itself runs on these inputs; if it does, make"
        " torch.export.export(model, args, kwargs, strict=False) work first (its error is the cause"
        " of this one)",
    )


def weights_of_own_class(model: nn.Module) -> dict[str, type]:
    """The parameters and buffers whose class is no plain tensor's, as those of quantised weights.

    Args:
        model: any module.

    Returns:
        Qualified name → class.
    """
    plain = (Tensor, nn.Parameter, nn.Buffer)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: type(t) for name, t in tensors if type(t) not in plain}


def own_class_error(name: str, kind: type, source: str | None, found: str) -> CaptureError:
    """The error for a tensor of a class whose operations a graph cannot have.

    Args:
        name: of the parameter or buffer.
        kind: its class.
        source: ``file:line`` of the model, if known.
        found: what could not be captured.
    """
    return CaptureError(
        "a weight is of a class with operations of its own, which a captured graph cannot have",
        node=name.removeprefix("model."),
        source=source,
        expected="a plain tensor, or a wrapper that acts in __torch_dispatch__ only",
        found=f"{kind.__module__}.{kind.__qualname__} ({found})",
        remedy="keep plain weights in the pipeline (in torchao: tensor.dequantize()), or store the"
        " quantised values and scales as tensors of their own and dequantise them in the forward",
    )
