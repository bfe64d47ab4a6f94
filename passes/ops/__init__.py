"""Custom operators for functions that torch.export cannot capture as they are.

In: while a model is traced, calls of ``torch.ctc_loss`` and of custom autograd.Functions.
Out: ops in the graph (``autopipe::ctc_loss``, ``autopipe::function``) with the same results and
the same gradients.

Files, in reading order:

- `autograd_function`: custom autograd.Functions, with the user's own backward
- `ctc_loss`: the CTC loss, with a table whose size is known in advance
"""

from __future__ import annotations

from .autograd_function import (
    APPLY_OWNER,
    apply_function,
    record_function,
    recorded_functions,
    run_methods_under,
)
from .ctc_loss import CTC_LOSS_OP, exportable_ctc_loss

__all__ = [
    "APPLY_OWNER",
    "CTC_LOSS_OP",
    "apply_function",
    "exportable_ctc_loss",
    "record_function",
    "recorded_functions",
    "run_methods_under",
]
