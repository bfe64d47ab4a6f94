"""The modes of `torch.compile`, as settings of inductor."""

from __future__ import annotations

from typing import Any

import torch

from autopipe.passes._torch_inductor import mode_options

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""As for `torch.compile`."""


def inductor_options(mode: str) -> dict[str, Any]:
    """Return the settings for a mode, in the process as it is now.

    CUDA graphs are off in every mode: the next run of a graph overwrites what it returned, and a
    pipeline keeps the results of several micro-batches. C++ is compiled for the number of threads
    that operators have now, which is also that of a pipeline's workers.

    Args:
        mode: one of `MODES`.
    """
    return {
        **mode_options(mode),
        "triton.cudagraphs": False,
        "cpp.threads": torch.get_num_threads(),
    }
