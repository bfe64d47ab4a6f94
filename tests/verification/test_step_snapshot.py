"""Two training steps compared: what counts as different, and by how much.

Covers verification/locate.py (with `test_compare`, which breaks pipelines on purpose).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.verification.step_snapshot import TOLERANCE, StepSnapshot

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.layer(x))
        return {"y": y, "loss": y.square().sum()}


def snapshot(model: nn.Module, x: Tensor = X) -> StepSnapshot:
    leaves, spec = pytree.tree_flatten(((x,), {}))
    return StepSnapshot.of(model, model, leaves, spec)


def test_a_step_is_recorded_by_name() -> None:
    model = Model()
    x = X.clone().requires_grad_()
    found = snapshot(model, x)
    assert set(found.outputs) == {"result['y']", "result['loss']"}
    names = {n for n, _ in model.named_parameters()}
    assert set(found.gradients) == {*names, "input 0"}
    assert set(found.buffers) == {n for n, _ in model.named_buffers()}
    reference = Model()
    own = X.clone().requires_grad_()
    reference(own)["loss"].backward()
    assert torch.equal(found.gradients["layer.weight"], reference.layer.weight.grad)
    assert torch.equal(found.gradients["input 0"], own.grad)
    assert x.grad is None


def test_equal_steps_do_not_differ() -> None:
    model = Model()
    first, second = snapshot(copy.deepcopy(model)), snapshot(copy.deepcopy(model))
    differences = list(first.against(second, None))
    assert len(differences) == 2 + 4 + 3
    assert all(d.ok and d.largest == 0 for d in differences)


def test_a_difference_is_measured() -> None:
    model, other = Model(), Model()
    with torch.no_grad():
        other.layer.weight[0, 0] += 0.5
    differences = {d.name: d for d in snapshot(model).against(snapshot(other), None)}
    found = differences["result['y']"]
    a, b = snapshot(Model()).outputs["result['y']"], snapshot(other).outputs["result['y']"]
    assert found.largest == (a.double() - b.double()).abs().max().item()
    assert found.scale == a.abs().max().item()
    assert found.tolerance == TOLERANCE[torch.float32]
    assert not found.ok
    assert all(d.ok for d in snapshot(model).against(snapshot(other), math.inf))


def test_absent_gradients_shapes_and_values_that_are_no_numbers() -> None:
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.full((2,), math.nan)

    def kinds(expected: Tensor | None, found: Tensor | None) -> list[tuple[bool, float]]:
        pair = (StepSnapshot({}, {"p": g}, {}) for g in (expected, found))
        first, second = pair
        return [(d.ok, d.largest) for d in first.against(second, None)]

    assert kinds(None, None) == []
    assert kinds(None, zero) == kinds(zero, None) == kinds(nan, nan) == [(True, 0.0)]
    assert kinds(one, None) == [(False, 1.0)]
    assert kinds(one, torch.ones(3)) == [(False, math.inf)]
    ((ok, largest),) = kinds(one, nan)
    assert not ok
    assert math.isnan(largest)
