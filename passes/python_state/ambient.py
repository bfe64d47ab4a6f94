"""Settings of the process that decide what a model computes: default dtype, kernels, and so on."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.backends import cuda, mha, mkldnn

from autopipe.errors import CaptureError
from autopipe.passes._torch_modes import (
    autocast_device_types,
    backward_hooks_of_all,
    forward_hooks_of_all,
    function_modes,
)
from autopipe.passes.graph import is_user_file, line_of
from autopipe.passes.one_at_a_time import replaced

from .value_keys import WeakIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    "torch function modes": lambda: tuple(map(WeakIdentity, function_modes())),
    "hooks of all modules": lambda: tuple(
        WeakIdentity(hook)
        for registry in (*forward_hooks_of_all(), *backward_hooks_of_all())
        for hook in registry.values()
        if is_users_hook(hook)
    ),
}
"""What is recorded in a captured graph, or chooses the kernels of its stages."""


def is_users_hook(hook: Any) -> bool:
    """Whether a hook is not one of torch, such as those of `FlopCounterMode`, which only look."""
    line = line_of(hook)
    return line is None or is_user_file(line)


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


def _autocast() -> tuple[Any, ...]:
    kinds = autocast_device_types()
    return tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)


READABLE: dict[str, Any] = {
    "is_grad_enabled": torch.is_grad_enabled,
    "is_inference_mode_enabled": torch.is_inference_mode_enabled,
    "is_autocast_enabled": _autocast,
    "get_autocast_dtype": _autocast,
    "get_autocast_gpu_dtype": _autocast,
    "get_autocast_cpu_dtype": _autocast,
    "is_autocast_cpu_enabled": _autocast,
    "get_num_threads": torch.get_num_threads,
}
"""Functions of torch that tell a forward the mode of a call → what is compared."""

OUTSIDE = ("is_grad_enabled", "is_inference_mode_enabled")
"""Those whose mode a trace has not: gradients are always on."""


class CallModes:
    """The modes of the call that a model is captured for, as far as the forward reads them.

    Attributes:
        outer: name of a function → what it returns outside of the trace.
        read: the names of those that the forward called.
    """

    def __init__(self) -> None:
        self.outer = {name: value() for name, value in READABLE.items()}
        self.read: set[str] = set()

    @contextmanager
    def visible(self) -> Iterator[None]:
        """Let the user's code see the call's modes until exit, and note what it asks for."""
        with ExitStack() as stack:
            for name in OUTSIDE:
                stack.enter_context(replaced(torch, name, self._reader(name)))
            yield

    def _reader(self, name: str) -> Any:
        original = getattr(torch, name)
        traced = original()

        def read() -> Any:
            found = original()
            if not is_user_file(sys._getframe(2).f_code.co_filename):
                return found
            self.read.add(name)
            return self.outer[name] if found == traced else found  # else the model switched it

        return read

    def note(self, function: Any, source: str) -> None:
        """Note that the user's code calls a function of torch, if it is one of these.

        Args:
            function: a function that is not written in Python.
            source: the line that calls it.

        Raises:
            CaptureError: it would not see the mode of the call.
        """
        name = getattr(function, "__name__", "")
        if name not in READABLE or getattr(torch, name, None) is None:
            return
        self.read.add(name)
        if name in OUTSIDE and self.outer[name] != READABLE[name]():
            raise CaptureError(
                "the forward asks for a mode of the call in a way that a trace cannot answer",
                source=source,
                found=name,
                remedy=f"write torch.{name}() in the forward",
            )

    def changed(self) -> str | None:
        """Return the name of a function that would give another answer now, or None."""
        return next((n for n in self.read if READABLE[n]() != self.outer[n]), None)
