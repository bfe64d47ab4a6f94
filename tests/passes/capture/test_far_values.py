"""Counters of which the first two calls tell nothing."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from autopipe.passes.capture.far_values import MOST_ANSWERS, OtherFloat, OtherInt
from tests.support.agreement import assert_close


class Net(nn.Module):
    """``forward(x)`` multiplies by ``use(self)``."""

    def __init__(self, use: Callable[[Any], float], **held: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.use = use
        self.double()
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()) * self.use(self)


def batch() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def warm_up(net: Any) -> float:
    net.steps += 1
    return 2.0 if net.steps > 1000 else 1.0


def warm_up_of_object(net: Any) -> float:
    net.held.steps += 1
    return 2.0 if net.held.steps > 1000 else 1.0


def every_tenth(net: Any) -> float:
    net.steps = net.steps + 1
    return 2.0 if net.steps % 10 == 0 else 1.0


def anneal(net: Any) -> float:
    net.heat = net.heat * 0.9
    return 1.0 if net.heat > 0.01 else 2.0


def until(net: Any) -> float:
    net.steps = min(net.steps + 1, 100)
    return 1.0 if net.steps < 50 else 2.0


def history(net: Any) -> float:
    net.seen.append(1)
    return 2.0 if len(net.seen) >= 3 else 1.0


READ: dict[str, tuple[Callable[[Any], float], dict[str, Any]]] = {
    "warm-up": (warm_up, {"steps": 0}),
    "warm-up of an object": (warm_up_of_object, {"held": types.SimpleNamespace(steps=0)}),
    "every tenth": (every_tenth, {"steps": 0}),
    "annealing": (anneal, {"heat": 1.0}),
    "clamped": (until, {"steps": 0}),
    "list": (history, {"seen": []}),
    "window": (history, {"seen": collections.deque(maxlen=3)}),
}


@pytest.mark.parametrize("name", READ)
def test_a_counter_that_decides_much_later_is_refused(name: str) -> None:
    """The pipeline never counted, and went on with the first branch for ever."""
    use, held = READ[name]
    model = Net(use, **held)
    with pytest.raises(CaptureError, match="keeps state"):
        autopipe.compile(model, 2, 2)(batch())
    kept = [getattr(model, n) for n in held if n != "held"]
    assert [len(v) if hasattr(v, "append") else v for v in kept] in ([0], [1.0], [])


def count(net: Any) -> float:
    net.steps += 1
    return 2.0


def count_for_a_log(net: Any) -> float:
    net.steps += 1
    if net.steps % 100 == 0:
        net.logged.append(net.steps)
    return 2.0


@pytest.mark.parametrize("use", [count, count_for_a_log])
@pytest.mark.filterwarnings("ignore:the model's forward sets")
def test_a_counter_that_decides_nothing_is_captured(use: Callable[[Any], float]) -> None:
    model, x = Net(use, steps=0, logged=[]), batch()
    pipe = autopipe.compile(model, 2, 2)
    found = pipe(x)
    assert (model.steps, model.logged) == (0, [])
    assert_close(found, model(x))


def test_a_number_answers_the_other_way_round() -> None:
    steps, heat = OtherInt(3), OtherFloat(0.5)
    assert steps != 3
    assert steps > 5
    assert (steps + 1) % 4 == 1
    assert 2 * steps - 6
    assert heat * 2 != 1.0
    assert f"{steps}" == "3"
    steps.answers[0] = MOST_ANSWERS
    with pytest.raises(CaptureError, match="without end"):
        bool(steps > 5)
