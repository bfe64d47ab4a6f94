"""Common reasons why a forward cannot be captured, told by the exception and the line of code.

To explain another one, add a `Reason` to `REASONS`; the first that fits is used.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from autopipe.errors import OptionError, describe
from autopipe.passes.python_state import AVOIDING_OPTIONS

NOT_CAPTURED = "under `if not torch.compiler.is_compiling():` it runs in the model itself only"

MAY_STAY = "a check that only raises or asserts may stay (not in a try, or before Python 3.11)"


class Reason(NamedTuple):
    """Why a forward cannot be captured.

    Attributes:
        problem: what happened, in one sentence.
        remedy: what the reader can do.
        exception: what is found in ``Class: text`` of the exception, a regular expression.
        code: what is found in the line of the model, too; "" fits any line, also none.
    """

    problem: str
    remedy: str
    exception: str
    code: str = ""

    def fits(self, exception: str, code: str) -> bool:
        """Whether this is the reason.

        Args:
            exception: ``Class: text`` of the exception.
            code: the line of the model; "" if it is not known.
        """
        return bool(re.search(self.exception, exception) and re.search(self.code, code))


DATA_DEPENDENT = r"(?i)^\w*DataDependent|data-dependent"

REASONS = (
    Reason(
        "the forward checks the values of tensors, which a captured graph does not have",
        f"check the pipeline's result: loss.isfinite(); {MAY_STAY}; {NOT_CAPTURED}",
        DATA_DEPENDENT,
        r"^assert\b|\bis(nan|inf|finite)\b|\ballclose\b",
    ),
    Reason(
        "the forward turns a tensor into a Python number, which a captured graph does not have",
        "leave out float(), int() and bool(): a tensor of one entry does what its number does;"
        " what decides between two branches is torch.where",
        DATA_DEPENDENT,
        r"\b(float|int|bool|math\.\w+)\(",
    ),
    Reason(
        "control flow that depends on the values of tensors cannot be captured",
        "compute both branches and select with torch.where, or decide outside of the model and pass"
        f" the decision in as a Python value; {MAY_STAY}; {AVOIDING_OPTIONS}",
        DATA_DEPENDENT,
    ),
    Reason(
        "the forward writes the value of a tensor into a text, but a captured graph has no values",
        f"return the value beside the result and write it outside of the pipeline; {NOT_CAPTURED}",
        r"unsupported format string passed to (Sym|Fake|Functional|Tensor)",
    ),
    Reason(
        "the forward gives a tensor to NumPy, which a captured graph does not call",
        "compute it with torch, or outside of the model and pass it in as an argument",
        r"\.numpy\(\) is not supported|Can't call numpy\(\)",
    ),
    Reason(
        "the forward uses a device of its own choice: a stage may be on any device",
        "create a tensor where the input is, torch.ones(4, device=x.device), or keep it in a buffer"
        " (register_buffer); leave out .cuda() and .to(device): the pipeline moves parameters and"
        " inputs",
        r"is not on the expected device|same device|support for \w+ devices|not compiled with CUDA"
        r"|No (CUDA|NVIDIA|HIP)|Found no NVIDIA|Cannot access accelerator",
    ),
    Reason(
        "the call has not the arguments of the model's forward",
        "pass what the forward asks for; a target that only the loss needs goes to"
        " pipe.step(x, target=y), with loss_fn given to autopipe.compile",
        r"^TypeError: .*\b(missing \d+ required|takes \d+ positional|takes from \d+ to"
        r"|unexpected keyword argument|multiple values for)",
        r"^$",
    ),
    Reason(
        "an operator of the model does not accept these dtypes",
        "give ids and classes as torch.long, data in the dtype of the parameters"
        " (x.to(next(model.parameters()).dtype)), or call the pipeline under torch.autocast",
        r"same dtype|scalar type|target dtype|dtype to be",
    ),
    Reason(
        "an operator of the model does not accept these shapes",
        "compare the shape of the input with the layer's; s followed by digits in the message is"
        " the number of samples",
        r"reduction dim|shapes? cannot be multiplied|size mismatch|must match the size"
        r"|not be broadcast|Shape mismatch|to have \d+ channels|normalized_shape",
    ),
)
"""From the special to the general."""

OTHER = Reason(
    "torch.export cannot capture the model",
    "check that the model itself runs on these inputs; if it does, make"
    " torch.export.export(model, args, kwargs, strict=False) work first (its error is the cause"
    " of this one)",
    "",
)


def reason_for(exception: str, code: str) -> Reason:
    """The first reason that fits, or `OTHER`.

    Args:
        exception, code: as for `Reason.fits`.
    """
    return next((r for r in REASONS if r.fits(exception, code)), OTHER)


def missing_target(error: Exception) -> OptionError:
    """The error of a step whose loss function fails for want of a target.

    Args:
        error: what the loss function raised.
    """
    return OptionError(
        "loss_fn failed, and step was called without a target",
        found=describe(error),
        remedy="pass the target by name: pipe.step(x, target=y)",
    )
