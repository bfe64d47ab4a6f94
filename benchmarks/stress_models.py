"""The small models that `benchmarks.stress` compiles over and over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, BATCH = 8, 8


class Settings:
    """An object that a custom Function is given; it refers to a whole model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.factor = model, 2.0


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Settings) -> Tensor:
        ctx.settings = settings
        return x * settings.factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.settings.factor, None


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.__dict__["settings"] = Settings(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Scaled.apply(self.first(x), self.settings)).square().mean()


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.last(self.drop(self.first(x)))).square().mean()


class Mean(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


def mlp(*between: nn.Module) -> nn.Module:
    layers = between or (nn.Tanh(),)
    return Mean(nn.Linear(WIDTH, WIDTH), *layers, nn.Linear(WIDTH, WIDTH))


def batch() -> Tensor:
    return torch.randn(BATCH, WIDTH)


def gpt2_step() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    ids = torch.randint(0, 50, (BATCH, 8))
    return GPT2LMHeadModel(GPT2Config(**sizes)), lambda pipe: pipe(input_ids=ids, labels=ids).loss


def plain_step(make: Callable[[], nn.Module]) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = batch()
    return make(), lambda pipe: pipe(x)


KINDS: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "mlp": partial(plain_step, mlp),
    "transformer": gpt2_step,
    "batch norm": partial(plain_step, lambda: mlp(nn.BatchNorm1d(WIDTH))),
    "custom function": partial(plain_step, Custom),
    "dropout, skips": partial(plain_step, Skips),
}
