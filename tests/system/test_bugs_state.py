"""What a capture once did to the objects around a model, and what it once did not notice."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from tests.support.agreement import assert_close


class Net(nn.Module):
    """``forward(x)`` passes the hidden layer through ``use(self, hidden)``."""

    def __init__(
        self, use: Callable[[Any, Tensor], Tensor] = lambda net, h: h, held: Any = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.use, self.held = use, held
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(self, self.a(x).tanh()))


def batch() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- the user's own containers

Pair = collections.namedtuple("Pair", "one two")


class Ordered(collections.OrderedDict[str, Any]):
    """A user's own class."""


CONTAINERS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"a": 1.0},
    "list": lambda: [1.0],
    "tuple": lambda: (1.0, [2.0]),
    "named tuple": lambda: Pair([1.0], 2.0),
    "ordered dict": lambda: collections.OrderedDict(a=1.0),
    "user's ordered dict": lambda: Ordered(a=1.0),
    "defaultdict": lambda: collections.defaultdict(float, a=1.0),
    "deque": lambda: collections.deque([1.0], maxlen=2),
    "nested": lambda: {"a": [{"b": (1.0,)}]},
    "with a tensor": lambda: [torch.ones(2)],
}


def fails(net: Any, hidden: Tensor) -> Tensor:
    raise ValueError("as asked")


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("failing", [False, True])
def test_a_capture_leaves_the_users_containers_in_place(name: str, failing: bool) -> None:
    """torch.export put copies in their place: what the user changed afterwards had no effect."""
    held = CONTAINERS[name]()
    model = Net(fails if failing else lambda net, h: h, held)
    model.b.held = held  # shared by two modules
    items = list(held.values()) if isinstance(held, dict) else list(held)
    pipe = autopipe.compile(model, 2, 3)
    if failing:
        with pytest.raises(CaptureError):
            pipe(batch())
    else:
        pipe(batch())
    assert model.held is held
    assert model.b.held is held
    found = held.values() if isinstance(held, dict) else held
    assert all(a is b for a, b in zip(found, items, strict=True))


def test_what_the_user_changes_in_a_container_after_a_capture_counts() -> None:
    settings = {"scale": 1.0}
    model, x = Net(lambda net, h: h * net.held["scale"], settings), batch()
    pipe = autopipe.compile(model, 2, 3)
    assert_close(pipe(x), model(x))
    for scale in (2.0, 3.0):
        settings["scale"] = scale
        assert_close(
            pipe(x),
            torch.nn.functional.linear(model.a(x).tanh() * scale, model.b.weight, model.b.bias),
        )
