"""By what factor gradients are larger than others, and what becomes of it.

Covers passes/_torch_foreach.py. The calls themselves, of autopipe/step_call.py:
`tests/system/test_schedules.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autopipe.loss_factor import LossFactor, common_factor, multiplied
from tests.support.simulated import Machine, simulated
from tests.support.simulated.engine import current, run_backward
from tests.support.simulated.nets import NETS, Loss
from tests.support.simulated.pairs import BATCH, WIDTH, Pair, host

X = torch.tensor([0.5, 0.0, -2.0])


@pytest.mark.parametrize(
    ("given", "arrived", "factor"),
    [
        ([X], [X], 1.0),
        ([X], [X * 8], 8.0),
        ([X], [X * 0], 0.0),
        ([X, X * 3], [X / 3, X], 1 / 3),
        ([X, None], [X * 2, None], 2.0),
        ([X, None], [X, X * 0], 1.0),
        ([X, None], [X, X], None),
        ([X, X], [X, X * 2], None),
        ([X, X], [X, None], None),
        ([X], [X + 1], None),
        ([X], [X * math.nan], math.nan),
        ([X], [X * math.inf], math.nan),
    ],
)
def test_common_factor(
    given: list[Tensor | None], arrived: list[Tensor | None], factor: float | None
) -> None:
    found = common_factor(given, arrived)
    if factor is None:
        assert found is None
    else:
        assert found == pytest.approx(factor, rel=1e-6, nan_ok=True)


def test_a_factor_is_used_until_another_is_found() -> None:
    factor = LossFactor()
    for found, value in ((1.0, 1), (8.0, 8), (1.0, 8), (math.nan, 8), (0.0, 8), (0.25, 2)):
        factor.settle(found)
        assert factor.for_next_step() == value
    factor.settle(8.0, always_one=True)
    assert factor.value == 2


def test_numbers_of_the_host_are_compared_there() -> None:
    factor = LossFactor()
    factor.settle(1.0)
    assert factor.ratio([torch.ones(())], [torch.ones(())]) is None


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("factor", [3.0, torch.tensor(3.0)])
def test_gradients_are_multiplied(factor: float | Tensor, in_place: bool) -> None:
    inputs = [torch.ones(2), None]
    parameters = [
        torch.ones(2, dtype=torch.bfloat16),
        None,
        torch.eye(2).to_sparse(),
        torch.ones(2),
    ]
    found = multiplied(inputs, parameters, factor, in_place=in_place)
    assert [None if g is None else g.to_dense().max().item() for g in found] == [
        *(3, None, 3, None, 3, 3),
    ]
    assert [g is None or g.dtype for g in found[2:]] == [g is None or g.dtype for g in parameters]
    same = [a is b for a, b in zip(found, (*inputs, *parameters), strict=True) if a is not None]
    assert same == ([False, True, True, True] if in_place else [False] * 4)


@pytest.mark.parametrize("shape", [(3,), ()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("factor", [65536.0, 1 / 3])
def test_a_tensor_multiplies_as_a_number_does(
    factor: float, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    gradient = torch.full(shape, 0.07).to(dtype)
    found = multiplied([], [gradient.clone()], torch.tensor(factor), in_place=True)
    assert found[0] is not None
    assert torch.equal(found[0], gradient * factor)


def step(machine: Machine, pair: Pair, patch: pytest.MonkeyPatch, scale: float) -> int:
    """How often the host waits in a step whose gradients are right."""
    losses = []
    for pipe, place in zip(pair.pipes, ("cpu", "lazy:0"), strict=True):
        pipe.model.zero_grad()
        x = torch.linspace(-1, 1, BATCH * WIDTH).reshape(BATCH, WIDTH).to(place)
        before = machine.counts["host waits"]
        run_backward(machine, pipe(x, x) * scale, current(machine), patch)
        waits = machine.counts["host waits"] - before
        losses.append([host(p.grad) for p in pipe.model.parameters()])
    for ours, truth in zip(*reversed(losses), strict=True):
        torch.testing.assert_close(ours, truth)
    return waits


class Weighted(Loss):
    """Its loss has a weight, a buffer."""

    weight: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("weight", torch.tensor(1.0))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) * self.weight


def test_a_loss_whose_weight_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETS, "own", Weighted)
    with simulated(monkeypatch, 2) as machine:
        pair = Pair(machine, "own", ["lazy:0"] * 2, schedule="1f1b")
        for weight in (1.0, 0.0, 0.0, 1.0):
            for pipe in pair.pipes:
                pipe.model.get_buffer("weight").fill_(weight)
            step(machine, pair, monkeypatch, 1)
            machine.rest()


def test_on_a_device_the_host_waits_until_the_factor_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with simulated(monkeypatch, 2) as machine:
        pair = Pair(machine, "loss", ["lazy:0"] * 2, schedule="1f1b")
        step(machine, pair, monkeypatch, 1)
        assert step(machine, pair, monkeypatch, 1) == 0
        assert step(machine, pair, monkeypatch, 1024) == 0
        factor = pair.pipes[1]._programs.last[0].loss_factor
        assert factor.value == 1
        machine.rest()
        step(machine, pair, monkeypatch, 1024)
        assert step(machine, pair, monkeypatch, 1024) == 0
        machine.rest()
        step(machine, pair, monkeypatch, 1024)
        assert factor.value == 1024
        assert machine.races == []


@pytest.mark.parametrize("devices", [["lazy:0", "lazy:1"], ["cpu", "lazy:0"]])
def test_gradients_of_the_host_wait_for_the_factor(
    devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a batch on the host, and of parameters of a stage there."""
    with simulated(monkeypatch, 2) as machine:
        pair = Pair(machine, "loss", devices, schedule="1f1b")
        for _ in range(3):  # the first finds the factor
            for what, ours, truth in pair.step(monkeypatch, "cpu", "default"):
                torch.testing.assert_close(ours, truth, msg=what)
        assert machine.races == []
