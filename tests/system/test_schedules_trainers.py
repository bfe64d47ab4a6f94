"""Other people's loops under every kind of schedule: their losses are GPipe's, bit for bit.

They accumulate over two batches, clip gradients, or scale the loss, by powers of two: exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.support.agreement import pipelined
from tests.support.models import gpt2
from tests.support.training import Tokens, model, numbers, trainer
from tests.system.test_trainers_others import Lit, accelerate, fit

pytestmark = [
    pytest.mark.usefixtures("alike_models_once"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]

CASES = {"1f1b": 2, "zb-h1": 2, "zb-v": 4}
"""Schedule → the number of its stages on two devices."""

by_schedule = pytest.mark.parametrize("schedule", CASES)


@pytest.fixture(autouse=True)
def _no_step_runs_again() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the backward is not that")
        yield


def both(schedule: str, make: Callable[[], nn.Module] = model) -> tuple[nn.Module, nn.Module]:
    """The model under a schedule, and under GPipe with the same stages."""
    own = pipelined(make(), schedule=schedule)
    return own.install(), pipelined(make(), devices=CASES[schedule]).install()


def assert_same_bits(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.full
@by_schedule
def test_the_trainer(schedule: str, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "max_steps": 5}
    runs = []
    for n, module in enumerate(both(schedule)):
        runs.append(trainer(module, tmp_path / str(n), **options))
        runs[-1].train()
    assert numbers(runs[0]) == numbers(runs[1])
    assert_same_bits(runs[0].model, runs[1].model)


@pytest.mark.few(1)
@by_schedule
def test_accelerate(schedule: str, tmp_path: Path) -> None:
    (own, losses), (other, expected) = (
        accelerate(module, tmp_path / str(n)) for n, module in enumerate(both(schedule))
    )
    assert losses == expected
    assert_same_bits(own, other)


@pytest.mark.full
@by_schedule
def test_lightning(schedule: str, tmp_path: Path) -> None:
    own, other = map(Lit, both(schedule))
    for n, module in enumerate((own, other)):
        fit(module, tmp_path / str(n), 2)
    assert torch.equal(torch.stack(own.seen), torch.stack(other.seen))
    assert_same_bits(own, other)


def scaled(module: nn.Module) -> list[Tensor]:
    """The loop of torch's page on mixed precision, with accumulation and clipping."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    seen: list[Tensor] = []
    for _ in range(2):
        for i, batch in enumerate(DataLoader(Tokens(20, 0), 6)):
            with torch.autocast("cpu", torch.bfloat16):
                loss: Any = module(**batch).loss / 2
            scaler.scale(loss).backward()
            seen.append(loss.detach())
            if i % 2:
                scaler.unscale_(optimizer)
                seen.append(nn.utils.clip_grad_norm_(module.parameters(), 0.5))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    assert scaler.get_scale() > 2.0**10
    return seen


@pytest.mark.few(2)
@by_schedule
def test_a_loss_scale(schedule: str) -> None:
    own, other = both(schedule)
    found, expected = scaled(own), scaled(other)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same_bits(own, other)


@pytest.mark.few(1)
@by_schedule
def test_a_loss_scale_that_overflows(schedule: str) -> None:
    """Steps are skipped and the scale is halved until it fits; a step starts with the scale of the
    one before, so this may take one step more than with GPipe."""
    scales = []
    for module in both(schedule, lambda: gpt2(layers=1)[0]):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        seen = []
        for _ in range(10):
            (batch,) = DataLoader(Tokens(6, 0), 6)
            loss = module(**batch).loss
            scaler.scale(loss * 4).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen.append(loss.item())
        assert seen[0] == seen[1]
        assert seen[-1] < seen[-2] < seen[-3]
        scales.append(scaler.get_scale())
    assert scales[1] / 2 <= scales[0] <= scales[1] < 2.0**127
