"""Settings of the process that decide what a model computes: default dtype, kernels, and so on."""

from __future__ import annotations

from typing import Any

import torch
from torch.backends import cuda, mha, mkldnn

from autopipe.errors import CaptureError

SETTINGS: dict[str, Any] = {
    "torch.get_default_dtype()": torch.get_default_dtype,
    "torch.get_default_device()": torch.get_default_device,
    "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled,
    "torch.backends.cuda.flash_sdp_enabled()": cuda.flash_sdp_enabled,
    "torch.backends.cuda.mem_efficient_sdp_enabled()": cuda.mem_efficient_sdp_enabled,
    "torch.backends.cuda.math_sdp_enabled()": cuda.math_sdp_enabled,
    "torch.backends.cuda.cudnn_sdp_enabled()": cuda.cudnn_sdp_enabled,
    "torch.backends.mha.get_fastpath_enabled()": mha.get_fastpath_enabled,
    "torch.backends.mkldnn.enabled": lambda: mkldnn.enabled,
}
"""What is recorded in a captured graph, or chooses the kernels of its stages."""


def ambient_settings() -> tuple[Any, ...]:
    """Return the values of `SETTINGS`: a graph is valid for those that it was captured with."""
    return tuple(read() for read in SETTINGS.values())


def ambient_modes() -> dict[str, Any]:
    """Return the modes that a forward may switch: those above, gradients, autocast."""
    modes = dict(zip(SETTINGS, ambient_settings(), strict=True))
    return modes | {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_autocast_enabled('cpu')": torch.is_autocast_enabled("cpu"),
        "torch.get_num_threads()": torch.get_num_threads(),
    }


def check_modes(before: dict[str, Any]) -> None:
    """Check that a forward left every mode as it was.

    Args:
        before: what `ambient_modes` returned before the forward.

    Raises:
        CaptureError: it left one changed: all later computations would differ.
    """
    for name, value in ambient_modes().items():
        if value != before[name]:
            raise CaptureError(
                "the forward switches a mode of torch, and leaves it switched",
                expected=f"{name} = {before[name]}, as before the forward",
                found=str(value),
                remedy="switch it in a with statement (torch.no_grad(), torch.enable_grad()), or"
                " before the model is called",
            )
