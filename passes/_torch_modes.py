"""What is active around a call: modes, hooks, function transforms. Private names of torch.

`_torch` has those of other kinds.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager


def in_functorch_transform(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a function transform is active, or has wrapped one of the tensors."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    batched = torch._C._functorch.is_legacy_batchedtensor  # by is_grads_batched
    return any(wrapped(t) or batched(t) for t in tensors)


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Ignore `saved_tensors_hooks` that are active, until exit."""
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


def forward_hooks_of_all() -> list[dict[int, Any]]:
    """The registries of forward hooks that all modules have (`register_module_forward_hook`)."""
    return [module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks]


def backward_hooks_of_all() -> list[dict[int, Any]]:
    """The registries of backward hooks that all modules have."""
    return [module_hooks._global_backward_pre_hooks, module_hooks._global_backward_hooks]


def is_profiled() -> bool:
    """Whether a `torch.profiler.profile` is open, in any thread, or NVTX ranges are emitted."""
    return torch.autograd.profiler._is_profiler_enabled


def dispatch_modes() -> list[TorchDispatchMode]:
    """The active `TorchDispatchMode`s of users, outermost first."""
    found: list[Any] = _get_current_dispatch_mode_stack()
    return [m for m in found if not m.is_infra_mode()]


def tracing_modes() -> list[TorchDispatchMode]:
    """The active modes of torch's tracers, which record ops; those of fake tensors do not."""
    found: list[Any] = _get_current_dispatch_mode_stack()
    return [m for m in found if m.is_infra_mode() and not isinstance(m, FakeTensorMode)]


@contextmanager
def without_dispatch_modes() -> Iterator[None]:
    """Switch off the active `TorchDispatchMode`s until exit."""
    with _disable_current_modes():
        yield


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Switch off the active `TorchFunctionMode`s, and those of subclasses, until exit."""
    with torch._C.DisableTorchFunction():
        yield


def function_modes() -> list[Any]:
    """The active `TorchFunctionMode`s, but for a default device."""
    found: Any = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return [m for m in found if not isinstance(m, DeviceContext)]


@contextmanager
def saved_tensors_seen(pack: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Call `pack` with each tensor that autograd saves, also within `without_saved_tensor_hooks`.

    Args:
        pack: returns what is saved in the tensor's place.
    """
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(False)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


def detached_unseen(tensor: Tensor) -> Tensor:
    """Detach a tensor; no active `TorchDispatchMode` sees it."""
    with _disable_current_modes():
        return tensor.detach()


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor has a tangent of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def has_autocast(device: torch.device) -> bool:
    """Whether `torch.autocast` knows a device's type."""
    return torch.amp.is_autocast_available(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast is off for a device while the context is open."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device) else nullcontext()


def autocast_device_types() -> tuple[str, ...]:
    """The device types for which autocast can be on: the CPU and this torch build's accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
