"""What stands in for parts of a model while it is captured, and is gone afterwards."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopipe.passes._torch import symbolic_fake_mode
from autopipe.passes.graph import is_user_file

from .norm_statistics import CUMULATIVE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class DataDetached(TorchFunctionMode):
    """``tensor.data`` is ``tensor.detach()``: export loses sight of the one, not of the other."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        is_data = func == Tensor.data.__get__  # type: ignore[attr-defined]
        return args[0].detach() if is_data else func(*args, **(kwargs or {}))


@contextmanager
def noted_hooks(module: nn.Module) -> Iterator[list[str]]:
    """Name the user's forward hooks that return nothing: where they are written, and of what.

    What a hook returns is captured. One that returns nothing may only look on (and keep what it
    sees): it runs now, and never again.
    """
    found: dict[str, list[str]] = {}

    def noting(path: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        code = getattr(hook, "__code__", None) or getattr(type(hook).__call__, "__code__", None)

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = hook(*args, **kwargs)
            if result is None and code is not None and is_user_file(code.co_filename):
                where = f"{code.co_filename}:{code.co_firstlineno}"
                found.setdefault(where, []).append(path or "the model")
            return result

        return noted

    registries: list[tuple[str, dict[int, Any]]] = [
        (path, registry)
        for path, m in module.named_modules()
        for registry in (m._forward_pre_hooks, m._forward_hooks)
    ]
    originals = [(r, key, hook) for _, r in registries for key, hook in r.items()]
    for path, registry in registries:
        registry.update({key: noting(path, hook) for key, hook in registry.items()})
    names: list[str] = []
    try:
        yield names
    finally:
        for registry, key, hook in originals:
            registry[key] = hook
        for where, paths in found.items():
            first, *others = dict.fromkeys(paths)
            more = f" and {len(others)} more" if others else ""
            names.append(f"{first}{more} ({where})")


@contextmanager
def cumulative_norms(module: nn.Module) -> Iterator[list[str]]:
    """Let batch norms with momentum None be traced, which would ask a counter for its value."""
    found = {
        name: m
        for name, m in module.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and m.momentum is None
        and m.training
        and m.track_running_stats
    }
    for norm in found.values():
        norm.momentum = CUMULATIVE
    try:
        yield list(found)
    finally:
        for norm in found.values():
            norm.momentum = None


@contextmanager
def off_meta(module: nn.Module, examples: list[Tensor]) -> Iterator[None]:
    """While a model on meta is traced, fakes on the CPU stand for its tensors (and the examples).

    What the model makes beside its own tensors, such as ``torch.tensor(3.0, device=x.device)``,
    would otherwise be captured on meta too: a constant without a value.
    """
    holders: list[dict[str, Any]] = [
        h for m in module.modules() for h in (m._parameters, m._buffers)
    ]
    originals = [(h, n, t) for h in holders for n, t in h.items() if t is not None and t.is_meta]
    if not originals:
        yield
        return
    fakes: dict[int, Tensor] = {}  # tied tensors stay tied
    with symbolic_fake_mode():
        for _, _, tensor in originals:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            fakes.setdefault(id(tensor), fake)
        examples[:] = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).requires_grad_(x.requires_grad)
            for x in examples
        ]
    try:
        for holder, name, tensor in originals:
            holder[name] = fakes[id(tensor)]
        yield
    finally:
        for holder, name, tensor in originals:
            holder[name] = tensor
