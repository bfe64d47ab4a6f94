"""Record outputs, gradients and buffers of one training step, and compare two such records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.passes.capture import take_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative to the largest entry (for gradients: of any gradient): the largest difference that
another order of summation may cause."""


@dataclass(frozen=True)
class Difference:
    """One tensor of the model's step compared with the pipeline's.

    Attributes:
        kind: "output", "gradient" or "buffer".
        name: of the output, parameter, input or buffer.
        largest: largest absolute difference of two entries (nan where only one of them is nan).
        scale: largest entry of the model's tensor; of all its gradients for a gradient.
        tolerance: the largest difference that counts as rounding, relative to `scale`.
    """

    kind: str
    name: str
    largest: float
    scale: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether they are equal up to rounding."""
        return self.largest <= self.tolerance * self.scale


@dataclass(frozen=True)
class _Allowed:
    """The difference that counts as rounding.

    Attributes:
        given: for every dtype; None: by dtype.
        slack: factor of the tolerance by dtype.
    """

    given: float | None
    slack: float

    def of(self, dtype: torch.dtype) -> float:
        """The tolerance for a dtype."""
        return TOLERANCE.get(dtype, 0.0) * self.slack if self.given is None else self.given


@dataclass(frozen=True)
class StepSnapshot:
    """Outputs, gradients and buffers after one training step, by name."""

    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, run: Callable[..., Any], leaves: Sequence[Any], spec: pytree.TreeSpec
    ) -> StepSnapshot:
        """Run a training step on copies of the inputs.

        Args:
            model: whose parameters and buffers are recorded.
            run: the model, or the pipeline of it.
            leaves: flattened inputs.
            spec: their structure.
        """
        own = [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in leaves
        ]
        args, kwargs = pytree.tree_unflatten(own, spec)
        result = run(*args, **kwargs)
        outputs = {f"result{n}": x for n, x in _named(result) if isinstance(x, Tensor)}
        wanted: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        wanted |= {
            f"input {n}": x for n, x in enumerate(own) if isinstance(x, Tensor) and x.requires_grad
        }
        roots = {n: x for n, x in outputs.items() if x.requires_grad}
        losses = {n: x for n, x in roots.items() if x.numel() == 1}
        roots = losses or roots
        gradients: Mapping[str, Tensor | None] = {}
        if roots and wanted:
            found = torch.autograd.grad(
                list(roots.values()),
                list(wanted.values()),
                [_weights(x) for x in roots.values()],
                allow_unused=True,
            )
            gradients = dict(zip(wanted, found, strict=True))
        return cls(
            {n: x.detach() for n, x in outputs.items()},
            gradients,
            {n: b.clone() for n, b in model.named_buffers()},
        )

    def against(
        self, found: StepSnapshot, tolerance: float | None, slack: float = 1.0
    ) -> Iterator[Difference]:
        """Compare this step, the model's, with the pipeline's.

        Args:
            found: the pipeline's step.
            tolerance: see `Difference`; None: by dtype.
            slack: factor of the tolerance by dtype.
        """
        allowed = _Allowed(tolerance, slack)
        for name, value in found.outputs.items():
            if name in self.outputs:
                yield _difference("output", name, self.outputs[name], value, allowed)
        scale = max((_scale(g) for g in self.gradients.values() if g is not None), default=0.0)
        for name, expected in self.gradients.items():
            value_or_none = found.gradients.get(name)
            if expected is None and value_or_none is None:
                continue
            zero = next(g for g in (expected, value_or_none) if g is not None) * 0
            a = zero if expected is None else expected
            b = zero if value_or_none is None else value_or_none
            yield _difference("gradient", name, a, b, allowed, scale)
        for name, value in found.buffers.items():
            yield _difference("buffer", name, self.buffers[name], value, allowed)


def _named(result: Any) -> list[tuple[str, Any]]:
    """The leaves of a result, named by their path if its containers have keys, else by number."""
    try:
        return [(pytree.keystr(p), x) for p, x in pytree.tree_leaves_with_path(take_apart(result))]
    except ValueError:  # a container registered without keys
        return [(f"[{n}]", x) for n, x in enumerate(pytree.tree_leaves(take_apart(result)))]


def _weights(root: Tensor) -> Tensor:
    """Choose a gradient for an output: one for a loss, else a different number for each entry."""
    if root.numel() == 1:
        return torch.ones_like(root)
    steps = torch.linspace(0.5, 1.5, root.numel(), device=root.device)
    return steps.to(root.dtype).view(root.shape)


def _difference(
    kind: str,
    name: str,
    expected: Tensor,
    found: Tensor,
    tolerance: _Allowed,
    scale: float | None = None,
) -> Difference:
    allowed = tolerance.of(expected.dtype)
    if expected.shape != found.shape:
        return Difference(kind, name, float("inf"), _scale(expected), allowed)
    found = found.to(expected.device)
    a, b = _exact(expected), _exact(found)
    equal = (a == b) | (a.isnan() & b.isnan())
    differences = (a - b).abs().masked_fill(equal, 0.0)
    largest = differences.max().item() if differences.numel() else 0.0
    return Difference(kind, name, largest, _scale(expected) if scale is None else scale, allowed)


def _exact(value: Tensor) -> Tensor:
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def _scale(value: Tensor) -> float:
    finite = _exact(value).abs()
    finite = finite[finite.isfinite()]
    return finite.max().item() if finite.numel() else 0.0
