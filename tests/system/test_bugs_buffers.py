"""One story per bug in what becomes of buffers. Each test failed before its fix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import autopipe
from tests.support.agreement import assert_agrees, assert_close, pipelined

pytestmark = pytest.mark.usefixtures("alike_models_once")


def batch(seed: int = 0) -> Tensor:
    return torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.float64)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return self.layer(x).sin()


def test_a_buffer_that_is_assigned_never_changed() -> None:
    """The exporter sees no write, and its graph had none. `verify` compared the model with itself:
    a step of the pipeline found the buffer as the model's own step had left it."""
    model = Counts()
    pipe = pipelined(model)
    for step in range(1, 4):
        pipe(batch())
        assert model.n == step
    assert pipe.verify(batch()).ok
    assert model.n == 3


def test_a_buffer_made_in_the_forward_became_a_fake() -> None:
    """And stayed one: the model itself returned fake tensors, its checkpoints were lost."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, dtype=torch.float64)
            self.register_buffer("table", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(4, dtype=torch.float64).sin()
            return self.layer(x + self.table).sin()

    model = Table()
    twin = copy.deepcopy(model)
    pipe = pipelined(model)
    for seed in range(2):
        assert_close(pipe(batch(seed)), twin(batch(seed)))
    assert model.table is None
    assert_close(model(batch()), twin(batch()))
    assert_close(model.table, twin.table)


@pytest.mark.filterwarnings("ignore:the model's forward sets")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_each_micro_batch_had_another_weight(norm: object) -> None:
    """Spectral norm's power iteration writes by ``out=`` and was run once per micro-batch: within
    one step the weight itself changed."""
    assert callable(norm)
    torch.manual_seed(0)
    layers = [norm(nn.Linear(4, 4, dtype=torch.float64)), nn.Tanh()]
    pipe = pipelined(nn.Sequential(*layers))
    assert_agrees(pipe, batch())
    assert_agrees(pipe, batch(1))


def test_a_stage_read_a_buffer_that_another_wrote() -> None:
    """Written through a view in the first stage, read by its name in the second: by then the
    first had worked on later micro-batches."""

    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
            self.register_buffer("scale", torch.ones(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            self.scale.view(-1).mul_(2)
            x = self.layers[1](x) * self.scale
            return self.layers[2](x).sin().cos().sin()

    model = Doubles()
    twin = copy.deepcopy(model)
    pipe = autopipe.compile(model, 2, 3, batch_norm="micro")
    assert_close(pipe(batch()), torch.cat([twin(part) for part in batch().tensor_split(3)]))


@pytest.mark.filterwarnings("ignore:the model's forward sets")
@pytest.mark.parametrize("size", [4, 6])
def test_one_buffer_got_the_value_of_another(size: int) -> None:
    """The mean of the loss is a division, and so are both vectors of spectral norm. In the
    epilogue, the division took the name of a value that was passed in, which then took the
    other's: with a square weight, u silently became v."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.Linear(4, size, dtype=torch.float64)
            self.layer = nn.utils.spectral_norm(layer)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.layer(x).sin(), y)

    model = Loss()
    twin = copy.deepcopy(model)
    pipe = autopipe.compile(model, 2, 3)
    for seed in range(3):
        x, y = batch(seed), torch.arange(7) % 4
        assert_close(pipe(x, y), twin(x, y))
    for found, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert_close(found, expected)
