"""Turn the errors of torch.export into short ones, with the line of the model."""

from __future__ import annotations

import linecache
import os
import traceback
from typing import TYPE_CHECKING

from torch import Tensor, nn

from autopipe.errors import CaptureError, text_of
from autopipe.passes._torch import FakeTensor
from autopipe.passes.graph import user_source_line

from .failures import reason_for

if TYPE_CHECKING:
    from autopipe.passes.ir import Input

    from .size_uses import SizeUses

DISTRIBUTIONS = os.path.join("torch", "distributions")


def explain(error: Exception, model: nn.Module) -> CaptureError:
    """Turn an error of torch.export into a short one with the line of the model.

    If no line of the model is known (the layers are torch's own), it is the line of the call.

    Args:
        error: what torch.export raised.
        model: which it was to capture.
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
    if "_CachedForward" in text:  # of torch.jit, from a ScriptModule whose class is replaced
        return CaptureError(
            "the forward calls a module of TorchScript: it has no Python code to capture",
            source=source,
            found=first,
            remedy="use the module that torch.jit.script or torch.jit.trace was called with",
        )
    reason = reason_for(f"{kind}: {text}", code)
    data_dependent = "DataDependent" in kind or "data-dependent" in text.lower()
    own = weights_of_own_class(model)
    if own and not data_dependent:
        return own_class_error(*next(iter(own.items())), source, f"{kind}: {first}")
    return CaptureError(
        reason.problem,
        source=source or user_source_line(traceback.extract_stack()),
        found=found if data_dependent else f"{kind}: {found}",
        remedy=reason.remedy,
    )


def fixed_size_error(item: Input, uses: SizeUses) -> CaptureError:
    """The error for a model that makes its batch dimension a constant.

    Args:
        item: the input of the call.
        uses: what in the model fixes sizes; nothing: an operator does.
    """
    shape = ", ".join(map(str, item.spec.shape)) + "," * (len(item.spec.shape) == 1)
    fixed_at = next(iter([*uses.concretized, *uses.fixing_vmaps]), None)
    if uses.concretized:
        remedy = (
            "take sizes from x.shape, not from len(x), and do not loop over the batch sample by"
            " sample (for, list, unbind)"
        )
    elif uses.fixing_vmaps:
        remedy = (
            "write the function under torch.vmap for a whole batch, with broadcasting: vmap runs"
            " some operators for one size only"
        )
    else:
        remedy = (
            f"dimension {item.batch_dim} of each input holds its samples. One sample without it"
            " gets it by x.unsqueeze(0); if samples are in another dimension, say so with in_dims=1"
            " (nn.LSTM without batch_first); in the forward, write x.shape[0] instead of a number:"
            " x.view(x.shape[0], -1)"
        )
    return CaptureError(
        "the model fixes the size of its batch dimension",
        node=item.name,
        source=fixed_at or user_source_line(traceback.extract_stack()),
        expected=f"any size in dimension {item.batch_dim}",
        found=f"always {item.spec.shape[item.batch_dim or 0]}, in a tensor of ({shape})",
        remedy=f"{remedy}; if this input is not batched, say"
        " so with in_dims (None for it); an ExportedProgram must be exported with a dynamic batch"
        " dimension",
    )


def weights_of_own_class(model: nn.Module) -> dict[str, type]:
    """The parameters and buffers whose class is no plain tensor's, as those of quantised weights.

    Args:
        model: any module.

    Returns:
        Qualified name → class.
    """
    plain = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)  # fakes stand for tensors elsewhere
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
