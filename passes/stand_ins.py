"""What stands in for parts of a model while it is captured, and is gone afterwards."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._torch import symbolic_fakes
from .buffers import CUMULATIVE

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    with symbolic_fakes():
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
