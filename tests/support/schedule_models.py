"""Models of which each has one thing that a schedule could get wrong; all return a loss.

`CASES`: name → (class, function from a number of samples to the inputs, options of `compile`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COUNT, WIDTH = 8, 6


class Stack(nn.Module):
    """Layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(COUNT))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(x), 0.1, self.training)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        for layer in self.layers:
            x = self.drop(layer(x))
        return F.cross_entropy(x, labels)


class Norms(Stack):
    """Running statistics in every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(COUNT))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.drop(norm(layer(x)))
        return F.cross_entropy(x, labels)


class Shared(Stack):
    """One weight in all stages, so on all devices and more than once on each."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(self.shared(self.drop(layer(x))))
        return F.cross_entropy(x, labels)


class Skips(Stack):
    """Values that jump over stages, and come back to a device that they have left."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x = self.drop(layer(x))
            skips.append(x)
            if 2 * i >= COUNT:
                x = x + skips[COUNT - 1 - i] * skips[0]
        return F.cross_entropy(x, labels)


class Integers(Stack):
    """Integers and booleans that all stages use; several inputs, one of which gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        x, keep = self.table(ids), mask.logical_not()[:, None]
        for layer in self.layers:
            x = torch.where(keep, torch.tanh(layer(x)) * scale, x + self.table(ids))
        return F.cross_entropy(x, labels)


class NoParameters(Stack):
    """Stages without parameters."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.layers[0](x)
        for _ in range(12):
            x = self.drop(x * 1.1)
        return F.cross_entropy(self.layers[1](x), labels)


class NoGradient(Stack):
    """First stages without a gradient."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            for layer in self.layers[:3]:
                x = self.drop(layer(x))
        for layer in self.layers[3:]:
            x = torch.tanh(layer(x))
        return F.cross_entropy(x, labels)


class Detached(Stack):
    """Stages in the middle without a gradient; the loss has a term of the first ones."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers[:3]:
            x = torch.tanh(layer(x))
        z = x.detach()
        for layer in self.layers[3:6]:
            z = torch.tanh(layer(z)).detach()
        for layer in self.layers[6:]:
            z = self.drop(layer(z))
        return F.cross_entropy(z, labels) + x.square().mean()


class Frozen(Skips):
    """Parameters that want no gradient, of which some follow others."""

    def __init__(self) -> None:
        super().__init__()
        for i in (0, 1, 4, 7):
            self.layers[i].requires_grad_(False)


class OneTrained(Skips):
    """All are frozen but one of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.layers[2].requires_grad_(True)


class NoneTrained(Skips):
    """Only the input gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class EarlyLoss(Stack):
    """A loss of an early layer; later stages get no gradient, and return values."""

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        loss = None
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            loss = F.cross_entropy(x, labels) if i == 2 else loss
        return {"loss": loss, "last": x.detach(), "labels": labels + 1}


class ManyLosses(Stack):
    """A loss that stages on all devices add to."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        loss: Any = 0
        for layer in self.layers:
            x = self.drop(layer(x))
            loss = loss + F.cross_entropy(x, labels) * 0.3
        return loss


class Twisted(torch.autograd.Function):
    """With a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * x.cos() * 2, None


class OwnBackward(Stack):
    """A custom Function in every stage."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = Twisted.apply(torch.tanh(layer(x)), 1.5)
        return F.cross_entropy(x, labels)


def floats(samples: int, *, grad: bool = False) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, WIDTH, generator=draw).requires_grad_(grad)
    return x, torch.randint(0, WIDTH, (samples,), generator=draw)


def with_gradient(samples: int) -> tuple[Tensor, ...]:
    return floats(samples, grad=True)


def integers(samples: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(samples)
    ids, labels = (torch.randint(0, n, (samples,), generator=draw) for n in (9, WIDTH))
    scale = torch.rand(samples, 1, generator=draw).requires_grad_()
    return ids, torch.rand(samples, generator=draw) < 0.5, labels, scale


Case = tuple[type[nn.Module], Callable[[int], tuple[Tensor, ...]], dict[str, Any]]

CASES: dict[str, Case] = {
    "plain": (Stack, floats, {}),
    "norms, micro": (Norms, floats, {"batch_norm": "micro"}),
    "norms, deferred": (Norms, floats, {"batch_norm": "deferred"}),
    "shared": (Shared, floats, {}),
    "skips": (Skips, floats, {}),
    "integers": (Integers, integers, {}),
    "no parameters": (NoParameters, floats, {}),
    "no gradient": (NoGradient, floats, {}),
    "detached": (Detached, floats, {}),
    "frozen": (Frozen, floats, {}),
    "one trained": (OneTrained, floats, {}),
    "none trained": (NoneTrained, with_gradient, {}),
    "input's gradient": (Skips, with_gradient, {}),
    "early loss": (EarlyLoss, floats, {}),
    "many losses": (ManyLosses, floats, {}),
    "own backward": (OwnBackward, floats, {}),
}
