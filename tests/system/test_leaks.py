"""What is dropped is freed: pipelines, models, batches and what compiling them created."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import StageError
from autopipe.passes._torch import ShapeEnv


class Scale:
    """An argument of a Function that refers to its model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.factor = 2.0


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Scale) -> Tensor:
        ctx.scale = scale
        return x * scale.factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale.factor, None


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.__dict__["scale"] = Scale(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Scaled.apply(self.first(x), self.scale))


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.drop(self.first(x)))


def layers(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), *between, nn.Linear(8, 8))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: layers(nn.ReLU()),
    "saved results": lambda: layers(nn.Tanh(), nn.Softmax(-1), nn.Sigmoid()),
    "batch norm": lambda: layers(nn.BatchNorm1d(8)),
    "custom function": Custom,
    "dropout and skips": Skips,
}


def trained(model: nn.Module) -> nn.Module:
    """A pipeline of a model after one step."""
    pipe = autopipe.compile(model, devices=2, chunks=2)
    pipe(torch.randn(4, 8)).sum().backward()
    return pipe


def alive(kind: type) -> list[Any]:
    """The objects of a kind. (Their `__class__` is not asked for: lazy modules load by it.)"""
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), kind)]


@pytest.mark.parametrize("name", MODELS)
def test_a_compile_leaves_no_tensors(name: str) -> None:
    for _ in range(2):
        trained(MODELS[name]())
    known = {id(x) for x in alive(Tensor)}
    for _ in range(3):
        trained(MODELS[name]())
    assert [x for x in alive(Tensor) if id(x) not in known] == []


@pytest.mark.parametrize("name", MODELS)
def test_a_dropped_model_is_freed(name: str) -> None:
    model = MODELS[name]()
    pipe = trained(model)
    dropped = [weakref.ref(x) for x in (model, pipe, *model.parameters(), *model.buffers())]
    del model, pipe
    gc.collect()
    assert [r() for r in dropped] == [None] * len(dropped)


def test_compiles_leave_no_shape_environments() -> None:
    """Torch's caches of their methods keep them, with every size that they have seen."""
    trained(MODELS["mlp"]())
    before = len(alive(ShapeEnv))
    for _ in range(3):
        trained(MODELS["mlp"]())
    assert len(alive(ShapeEnv)) <= before


def test_a_kept_loss_keeps_no_batch() -> None:
    pipe = trained(MODELS["mlp"]())
    x = torch.randn(4, 8)
    loss = pipe(x).sum()
    batch = weakref.ref(x)
    del x
    assert batch() is not None
    loss.backward()
    assert batch() is None
    assert loss.grad_fn is not None


def test_a_failing_step_leaves_no_cycle() -> None:
    """Without a collection, nothing of the step is left once its error is dropped."""
    pipe = autopipe.compile(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8)), devices=2, chunks=2)
    pipe(torch.tensor([0, 1, 2, 3])).sum().backward()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            ids = torch.tensor([0, 1, 2, 99])
            with pytest.raises(StageError):
                pipe(ids)
            batch = weakref.ref(ids)
            del ids
            assert batch() is None
    finally:
        gc.enable()
