"""Iterators that a forward advances are refused: each call would need the next value."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from autopipe.passes.python_state.iterators import iterator_state
from tests.support.agreement import assert_close


class Net(nn.Module):
    def __init__(self, read: Callable[[Any], float], held: Any) -> None:
        super().__init__()
        self.a, self.read, self.held = nn.Linear(4, 4), read, held

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.read(self)


def numbers() -> Iterator[float]:
    n = 1.0
    while True:
        yield n
        n += 1


MAKE: dict[str, Callable[[], Iterator[Any]]] = {
    "count": lambda: itertools.count(1),
    "cycle": lambda: itertools.cycle([1.0, 2.0]),
    "chain": lambda: itertools.chain([1.0], [2.0, 3.0]),
    "repeat": lambda: itertools.repeat(1.0, 5),
    "list": lambda: iter([1.0, 2.0, 3.0]),
    "dict": lambda: iter({1.0: "a", 2.0: "b"}),
    "map": lambda: map(float, [1, 2, 3]),
    "zip": lambda: (x for x, _ in zip([1.0, 2.0], [1, 2], strict=True)),
    "generator": numbers,
}


@pytest.mark.parametrize("name", MAKE)
def test_an_iterator_that_is_advanced_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="advances an iterator") as caught:
        autopipe.compile(Net(lambda n: next(n.held), MAKE[name]()), 1, 3)(torch.randn(6, 4))
    assert caught.value.found == "held"
    assert "pass it in" in str(caught.value.remedy)


@pytest.mark.parametrize("name", MAKE)
def test_states_differ_after_a_step(name: str) -> None:
    iterator = MAKE[name]()
    before = iterator_state(iterator)
    assert iterator_state(iterator) == before
    next(iterator)
    assert iterator_state(iterator) != before


def test_iterators_that_stay_or_are_the_forwards_own_pass() -> None:
    kept = itertools.count(1)
    model = Net(lambda n: sum(x for x, _ in zip([1.0, 2.0], itertools.count(), strict=False)), kept)
    x = torch.randn(6, 4)
    assert_close(autopipe.compile(model, 1, 3)(x), model(x))
    assert next(kept) == 1


def test_what_has_no_state_that_can_be_read() -> None:
    with open(__file__) as file:
        assert iterator_state(file) is None
    generator = numbers()
    generator.close()  # type: ignore[attr-defined]
    assert iterator_state(generator) == "finished"
