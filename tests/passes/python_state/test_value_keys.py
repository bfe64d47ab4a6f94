"""Equal keys for values that nothing can tell apart, other keys for all others."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from autopipe.passes.python_state.value_keys import is_same, value_key


class Mode(enum.Enum):
    A = 1
    B = 2


def scaled(by: float) -> Callable[[float], float]:
    return lambda x: x * by


def plus(x: float, y: float = 1.0) -> float:
    return x + y


NAN = float("nan")

EQUAL: list[Callable[[], Any]] = [
    lambda: 3,
    lambda: 2.5,
    lambda: NAN,
    lambda: complex(1, -0.0),
    lambda: "text",
    lambda: b"bytes",
    lambda: bytearray(b"bytes"),
    lambda: None,
    lambda: Mode.A,
    lambda: fractions.Fraction(1, 3),
    lambda: decimal.Decimal("0.1"),
    lambda: datetime.timedelta(1),
    lambda: np.float64(2.5),
    lambda: np.arange(6).reshape(2, 3),
    lambda: np.array([1.0, np.nan]),
    lambda: torch.float32,
    lambda: torch.Size([2, 3]),
    lambda: [1, [2.0, "x"], {"a": (1, 2)}],
    lambda: {1, 2, 3},
    lambda: frozenset({"a"}),
    lambda: collections.deque([1, 2]),
    lambda: collections.OrderedDict(a=1),
    lambda: slice(1, None, 2),
    lambda: range(3),
    lambda: scaled(2.0),
    lambda: functools.partial(plus, y=2.0),
]


@pytest.mark.parametrize("make", EQUAL, ids=lambda make: str(value_key(make()))[:40])
def test_equal_values(make: Callable[[], Any]) -> None:
    assert value_key(make()) == value_key(make())
    assert is_same(make(), make())
    hash(value_key(make()))


def noise(n: int) -> Any:
    """Arrays whose `repr` is the same."""
    values = np.zeros(2000)
    values[1000] = n
    return values


DIFFERENT: list[tuple[Any, Any]] = [
    (1, True),
    (1, 1.0),
    (0.0, -0.0),
    (complex(0, 0.0), complex(0, -0.0)),
    ("1", 1),
    (noise(1), noise(2)),
    (np.zeros(2), np.zeros(2, np.float32)),
    (np.zeros((2, 1)), np.zeros((1, 2))),
    (np.float64(1), 1.0),
    (Mode.A, Mode.B),
    ([1], (1,)),
    ([1], [True]),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({1}, frozenset({1})),
    (scaled(1.0), scaled(2.0)),
    (plus, scaled(1.0)),
    (functools.partial(plus, 1.0), functools.partial(plus, 2.0)),
    (object(), object()),
    (torch.ones(1), torch.ones(1)),
    (torch.float32, torch.float64),
    (fractions.Fraction(1, 2), fractions.Fraction(1, 3)),
]


@pytest.mark.parametrize(("a", "b"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_different_values(a: Any, b: Any) -> None:
    assert value_key(a) != value_key(b)
    assert not is_same(a, b)
    assert is_same(a, a)


def test_a_container_of_the_same_tensors() -> None:
    x = torch.ones(1)
    assert is_same({"a": [x, 1.5]}, {"a": [x, 1.5]})
    assert not is_same({"a": [x]}, {"a": [x.clone()]})


def test_a_list_that_holds_itself_has_a_key() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert value_key(loop) == value_key(loop)
