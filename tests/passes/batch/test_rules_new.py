"""New tensors of the batch's shape: those that can be pipelined, and why the others cannot be.

Covers the operators that draw a tensor of a size, or like another, in each of their overloads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autopipe.errors import AutopipeError
from tests.support.agreement import pipelined
from tests.support.combining import Model, agrees, inputs

pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.few(6)]

New = Callable[[Tensor], Tensor]

DRAWS: dict[str, tuple[New, float, float]] = {
    "integers below a tensor": (lambda y: torch.randint_like(y, torch.tensor(9)), 4, 2.582),
    "integers below a drawn number": (
        lambda y: torch.randint_like(y, torch.randint(9, 10, ())),
        4,
        2.582,
    ),
    "integers between numbers": (lambda y: torch.randint_like(y, 3, 9), 5.5, 1.708),
    "normal numbers of a size": (lambda y: torch.normal(2.0, 3.0, y.shape), 2, 3),
    "normal numbers around a tensor": (lambda y: torch.normal(torch.ones_like(y), 3.0), 1, 3),
    "normal numbers with two tensors": (
        lambda y: torch.normal(torch.ones_like(y), torch.full_like(y, 2.0)),
        1,
        2,
    ),
}
"""What is drawn; mean and standard deviation of its distribution."""


@pytest.mark.parametrize("name", DRAWS)
def test_a_drawn_tensor_is_pipelined(name: str) -> None:
    """3600 numbers of the distribution: their mean is off by about 0.05."""
    draw, mean, deviation = DRAWS[name]
    pipe = pipelined(Model(lambda y: y * 0 + draw(y)))
    torch.manual_seed(1)
    drawn = pipe(inputs(600)).detach()
    assert abs(drawn.mean() - mean) < 0.25
    assert abs(drawn.std() - deviation) < 0.25
    for part, other in itertools.combinations(drawn.split(200), 2):
        assert not torch.equal(part, other), "each micro-batch draws its own"


def test_a_size_that_a_copy_is_expanded_to() -> None:
    agrees(lambda y: torch.expand_copy(y[:, :1], y.shape) + y)


REFUSED: dict[str, tuple[New, str]] = {
    "below a reduction": (
        lambda y: torch.randint_like(y, (y.sum().abs() + 2).long()),
        "depends on a reduction over all of them",
    ),
    "a reduction as deviation": (
        lambda y: torch.normal(y.detach(), y.detach().mean()),
        "depends on a reduction over all of them",
    ),
    "below the number of samples": (
        lambda y: torch.randint(0, y.shape[0], y.shape),
        "the number of samples is used as a value",
    ),
    "filled with the number of samples": (
        lambda y: y.new_full(y.shape, y.shape[0]),
        "the number of samples is used as a value",
    ),
    "an order of the samples": (
        lambda y: torch.randperm(y.shape[0])[:, None],
        "picked by position",
    ),
    "below a number that is drawn": (
        lambda y: torch.randint(0, int(torch.randint(2, 9, ()).item()), y.shape),
        "turns a tensor into a Python number",
    ),
    "below as many as there are samples": (
        lambda y: torch.randint_like(y, y.shape[0]),
        "fixes the size of its batch dimension",
    ),
    "a channel of all samples dropped": (
        lambda y: torch.nn.functional.dropout2d(y.t()[None, :, None], 0.5)[0, :, 0].t(),
        "works along the batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_of_a_refusal_is_true(name: str) -> None:
    new, reason = REFUSED[name]
    with pytest.raises(AutopipeError, match=reason):
        pipelined(Model(lambda y: y + new(y)))(inputs())
