"""Small models for simulated devices: called with ``(x, mask)``, both of shape (samples, width)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Chain(nn.Module):
    """Layers one after the other; only the last reads the mask."""

    def __init__(self, width: int, layers: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x * mask


class MaskFirst(Chain):
    """The last layers read nothing of the caller's."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * mask
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class SkipAndMask(Chain):
    """Every layer reads the mask, and the last the input."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = torch.relu(layer(x)) * mask
        return x + first


class Loss(Chain):
    """Returns its loss, a mean over the batch."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask).square().mean()


class Outputs(Chain):
    """Results of the first and the last layer, which also have a value in common."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        first = z = self.layers[0](x)
        for layer in self.layers[1:]:
            z = torch.relu(layer(z))
        return first, z * mask + first


class Tied(Chain):
    """The first layer's weight is used again at the end; dropout between."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = x + torch.dropout(torch.tanh(layer(x)), 0.2, self.training) * mask
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        return x @ first.weight


class Norms(nn.Module):
    """Batch norms, whose statistics change in the forward, in several stages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = torch.relu(norm(layer(x)))
        return self.layers[-1](x) * mask  # type: ignore[no-any-return]


NETS: dict[str, Callable[[int], nn.Module]] = {
    "chain": Chain,
    "skip and mask": SkipAndMask,
    "loss": Loss,
    "outputs": Outputs,
    "tied": Tied,
    "norms": Norms,
}
