"""Context managers that replace parts of a model while it is traced."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from autopipe.errors import CaptureError
from autopipe.passes._torch import BatchNormBase, symbolic_fake_mode
from autopipe.passes._torch_modes import forward_hooks_of_all
from autopipe.passes.graph import is_user_file, line_of
from autopipe.passes.one_at_a_time import replaced
from autopipe.passes.python_state import is_users_hook

from .norm_statistics import CUMULATIVE_MOMENTUM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_SIZES = torch.Size()


@contextmanager
def find_observer_hooks(module: nn.Module) -> Iterator[list[str]]:
    """Find the user's forward hooks that return nothing.

    What a hook returns is captured. A hook that returns nothing may only observe, and store what it
    sees. It runs while the model is traced, but not when the pipeline runs.

    Args:
        module: its hooks are wrapped until exit.

    Yields:
        A list, filled on exit: for each hook, the modules that have it and its source line.
    """
    found: dict[str, list[str]] = {}

    def wrap(path: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        line = line_of(hook)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = hook(*args, **kwargs)
            if result is None and line is not None and is_user_file(line):
                found.setdefault(line, []).append(path or "the model")
            return result

        return wrapped

    registries: list[tuple[str, dict[int, Any]]] = [
        (path, registry)
        for path, m in module.named_modules()
        for registry in (m._forward_pre_hooks, m._forward_hooks)
    ]
    shared = forward_hooks_of_all()
    originals = [
        (r, key, hook) for r in (*(r for _, r in registries), *shared) for key, hook in r.items()
    ]
    for path, registry in registries:
        registry.update({key: wrap(path, hook) for key, hook in registry.items()})
    for registry in shared:
        registry.update(
            {
                key: _of_model(hook, wrap("every module", hook), module)
                for key, hook in registry.items()
            }
        )
    names: list[str] = []
    try:
        yield names
    finally:
        for registry, key, hook in originals:
            if key in registry:  # another thread may have removed one of all modules
                registry[key] = hook
        for line, paths in found.items():
            first, *others = dict.fromkeys(paths)
            more = f" and {len(others)} more" if others else ""
            names.append(f"{first}{more} ({line})")


def _of_model(
    hook: Callable[..., Any], watched: Callable[..., Any], model: nn.Module
) -> Callable[..., Any]:
    """A hook of all modules, but not for those that a capture puts around the model.

    One that changes a value is refused: it would act on the pipeline itself, too. Hooks of torch's
    own (`FlopCounterMode`) are not called: they look at what runs, not at traces.

    Args:
        hook: it.
        watched: what is called for modules of the model in this thread.
        model: the model.
    """
    own, thread = {id(m) for m in model.modules()}, threading.get_ident()

    def wrapped(caller: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return hook(caller, *args, **kwargs)
        if id(caller) not in own or not is_users_hook(hook):
            return None
        result = watched(caller, *args, **kwargs)
        if result is not None:
            raise CaptureError(
                "a hook that all modules of the process call changes a value",
                source=line_of(hook),
                found=f"it returns {type(result).__name__} for {type(caller).__name__}",
                remedy="register it at the modules that it is meant for:"
                " module.register_forward_hook(hook)",
            )
        return None

    return wrapped


@contextmanager
def trace_cumulative_norms(module: nn.Module) -> Iterator[list[str]]:
    """Make batch norms with momentum None traceable.

    Their forward reads the value of a counter, but a traced tensor has no value. Until exit, their
    momentum is `CUMULATIVE_MOMENTUM`.

    Args:
        module: the model.

    Yields:
        The paths of these norms.
    """
    found = {
        name: m
        for name, m in module.named_modules()
        if isinstance(m, BatchNormBase)
        and m.momentum is None
        and m.training
        and m.track_running_stats
    }
    for norm in found.values():
        norm.momentum = CUMULATIVE_MOMENTUM
    try:
        yield list(found)
    finally:
        for norm in found.values():
            norm.momentum = None


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """Switch off the checks that `torch.distributions` makes unless told otherwise.

    They read the values of parameters and samples, which a trace does not have.
    """
    original = Distribution.__init__

    def initialize(
        self: Distribution,
        batch_shape: torch.Size = NO_SIZES,
        event_shape: torch.Size = NO_SIZES,
        validate_args: bool | None = None,
    ) -> None:
        original(self, batch_shape, event_shape, bool(validate_args))

    with replaced(Distribution, "__init__", initialize):
        yield


@contextmanager
def find_nested_encoders(module: nn.Module) -> Iterator[list[str]]:
    """Find the encoders of torch that may turn padded sequences into nested tensors.

    In evaluation without gradients, eager torch then returns zeros at the padded positions. Whether
    it does depends on values of the mask; torch.export (and torch.compile) do not do it.

    Args:
        module: the model.

    Yields:
        A list, filled while the model is traced: the paths of these encoders.
    """
    paths = {
        id(m): name or "the model"
        for name, m in module.named_modules()
        if isinstance(m, nn.TransformerEncoder)
        and getattr(m, "use_nested_tensor", False)
        and not any(layer.training for layer in m.layers[:1])
    }
    found: list[str] = []

    def called(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See a call (src, mask, src_key_padding_mask, …) of one of them."""
        padding = kwargs.get("src_key_padding_mask", args[2] if len(args) > 2 else None)
        if padding is not None and paths[id(encoder)] not in found:
            found.append(paths[id(encoder)])

    if not torch.backends.mha.get_fastpath_enabled():
        paths.clear()
    handles = [
        m.register_forward_pre_hook(called, with_kwargs=True)
        for m in module.modules()
        if id(m) in paths
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gather_on_one_device(module: nn.Module, examples: list[Tensor]) -> Iterator[None]:
    """Replace a model's tensors on other devices, and the examples, by fakes on one until exit.

    Parameters are on several devices once a pipeline has placed them, and the examples may be on
    yet another one, so the model could not be called. On meta, tensors that the model creates, such
    as ``torch.tensor(3.0, device=x.device)``, would be captured as constants without values.

    The device is that of the first example, or the CPU if there is a meta tensor.

    Args:
        module: the model; nothing happens if all its tensors and the examples share a device.
        examples: is changed.
    """
    holders: list[dict[str, Any]] = [
        h for m in module.modules() for h in (m._parameters, m._buffers)
    ]
    held = [(h, n, t) for h in holders for n, t in h.items() if t is not None]
    # A tensor without dimensions may be on the CPU while the others are on a GPU.
    tensors = [*examples, *(t for _, _, t in held)]
    devices = list(dict.fromkeys(t.device for t in tensors if t.dim()))
    meta = any(t.is_meta for _, _, t in held)
    if not meta and len(devices) < 2:
        yield
        return
    home = torch.device("cpu") if meta else devices[0]
    originals = [(h, n, t) for h, n, t in held if t.device != home]
    fakes: dict[int, Tensor] = {}  # tied tensors stay tied
    with symbolic_fake_mode():
        for _, _, tensor in originals:
            fake = _empty_like(tensor, home)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            fakes.setdefault(id(tensor), fake)
        examples[:] = [_empty_like(x, home).requires_grad_(x.requires_grad) for x in examples]
    try:
        for holder, name, tensor in originals:
            holder[name] = fakes[id(tensor)]
        yield
    finally:
        for holder, name, tensor in originals:
            holder[name] = tensor


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
