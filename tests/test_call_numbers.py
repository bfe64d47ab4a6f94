"""Numbers that are arguments and change: captured once with constants, once as inputs.

Covers autopipe/varying.py, autopipe/valid_calls.py, passes/capture/passed_numbers.py and
passes/capture/number_checks.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.call_numbers import as_tensors, changed_numbers, number_keys

pytestmark = pytest.mark.few(2)


class Net(nn.Module):
    """``forward(x, number)`` is ``f(output of two layers, number)``."""

    def __init__(self, f: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.f = nn.Linear(4, 4), nn.Linear(4, 4), f

    def forward(self, x: Tensor, number: Any) -> Any:
        return self.f(self.b(self.a(x).tanh()), number)


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a negative number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grads[0], None


def in_regions(h: Tensor, number: float) -> Tensor:
    """Computes with a number where no gradients are recorded, and under autocast."""
    with torch.no_grad():
        factor = h.abs().mean(-1, keepdim=True) * number + h.shape[1] / 3
    with torch.autocast("cpu", torch.bfloat16):
        return h * factor * number


def batch(n: int, length: int = 3) -> Tensor:
    return torch.randn(6, length, 4, generator=torch.Generator().manual_seed(n))


def step(module: Any, model: nn.Module, x: Tensor, number: Any) -> list[Tensor]:
    """The result of a call and the gradients of the parameters."""
    out = module(x, number)
    return [out.detach(), *torch.autograd.grad(out.float().sum(), [*model.parameters()])]


def assert_same(pipe: Any, x: Tensor, number: Any) -> None:
    found, wanted = (step(m, pipe.model, x, number) for m in (pipe, pipe.model))
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    torch.testing.assert_close(found, wanted)


def captures(pipe: Any) -> int:
    return autopipe.explain_captures(pipe).count


COMPUTED: dict[str, tuple[Callable[[Tensor, Any], Any], list[Any]]] = {
    "a weight of a loss": (lambda h, w: h.mean() + w * h.square().mean(), [0.1, 0.2, 0.0, -1.5]),
    "both weights": (lambda h, w: (1 - w) * h.mean() + w * h.abs().mean(), [0.5, 0.25, 1.0]),
    "a temperature": (lambda h, t: (h / t).softmax(-1).square(), [1.0, 0.7, 0.1]),
    "an integer": (lambda h, n: h * n + n / 3, [1, 2, 10**6]),
    "a power": (lambda h, n: h.mean() * 0.9**n + h.abs().mean() ** n, [1.0, 2.0, 0.5]),
    "its square": (lambda h, n: h * n**2, [2.0, 3.0, 4.0]),
    "a sum with itself": (lambda h, n: h + (n + n * 2 - 1), [1.0, 3.0, 1e-6]),
    "a comparison": (lambda h, n: torch.where(h > n, h, h * 2), [0.0, 0.1, -0.1]),
    "a tensor full of it": (lambda h, n: h * torch.full((4,), n), [1, 2, 3]),
    "tensors like others": (
        lambda h, n: h * torch.full_like(h, n) + h.new_full((4,), n),
        [0.1, 0.2, 0.3],
    ),
    "a constant over it": (lambda h, n: h * (1e-310 / n), [1e-310, 2e-310, 1.0]),
    "a choice": (lambda h, n: h * torch.where(h > 0, n, 0.0), [0.1, 0.2, 0.3]),
    "equal steps": (lambda h, n: h * torch.linspace(0, n, 4), [0.1, 0.2, 0.3]),
    "regions": (in_regions, [0.5, 0.25, 0.1]),
    "nothing": (lambda h, n: h.mean(), [1, 2, 3]),
}


@pytest.mark.parametrize(("f", "numbers"), COMPUTED.values(), ids=COMPUTED)
def test_computed_with(f: Callable[[Tensor, Any], Any], numbers: list[Any]) -> None:
    pipe = autopipe.compile(Net(f), 2, 3)
    for n, number in enumerate(numbers):
        assert_same(pipe, batch(n), number)
    assert captures(pipe) == 2


BRANCHES: dict[str, tuple[Callable[[Tensor, Any], Any], list[Any], int]] = {
    "switched on": (
        lambda h, w: h.mean() + (w * h.abs().mean() if w > 0 else 0),
        [0.0, 0.1, 0.2, 0],
        3,
    ),
    "warm up": (lambda h, n: h.mean() * min(1.0, n / 4), [*range(9)], 3),
    "at most": (lambda h, n: h.mean() * max(n, 0.5), [0.2, 0.3, 0.6, 0.7, 0.1], 3),
    "each third": (lambda h, n: h.mean() if n % 3 else h.sum(), [1, 2, 3, 4, 5, 6], 3),
    "either": (lambda h, n: h if 0 < n < 1 or n == 5 else -h, [2.0, 0.5, 0.6, 5.0, 1.0, 7.0], 5),
}


@pytest.mark.parametrize(("f", "numbers", "most"), BRANCHES.values(), ids=BRANCHES)
@pytest.mark.filterwarnings("ignore:the model has been captured")
def test_branches(f: Callable[[Tensor, Any], Any], numbers: list[Any], most: int) -> None:
    """Each branch is captured once, with the numbers for which it is taken."""
    pipe = autopipe.compile(Net(f), 2, 3)
    for n, number in enumerate(numbers):
        assert_same(pipe, batch(n), number)
    assert captures(pipe) <= most


CONSTANTS: dict[str, tuple[Callable[[Tensor, Any], Any], list[Any]]] = {
    "a size": (lambda h, n: h[..., :n].mean(), [1, 2, 3]),
    "a loop": (lambda h, n: sum(h.mean() * i for i in range(n)), [2, 3, 4]),
    "a slope": (lambda h, n: nn.functional.leaky_relu(h, n), [0.1, 0.2, 0.3]),
    "a new tensor": (lambda h, n: h * torch.tensor(n), [1, 2, 3]),
    "a Function": (Reversed.apply, [0.1, 0.2, 0.3]),
    "a function of math": (lambda h, n: h * math.exp(n), [0.1, 0.2, 0.3]),
    "its type": (lambda h, n: h * (2 if isinstance(n, float) else 3), [0.1, 0.2, 0.3]),
    "its exact type": (lambda h, n: h if type(n) is int else -h, [1, 2, 3]),
    "other tensors": (lambda h, n: h + torch.ones(4) * (type(n) is int), [1, 2, 3]),
}


@pytest.mark.parametrize(("f", "numbers"), CONSTANTS.values(), ids=CONSTANTS)
def test_what_must_be_a_constant_is_captured_each_time(
    f: Callable[[Tensor, Any], Any], numbers: list[Any]
) -> None:
    pipe = autopipe.compile(Net(f), 2, 3)
    assert_same(pipe, batch(0), numbers[0])
    with pytest.warns(UserWarning, match="number: this model cannot be captured for any number"):
        assert_same(pipe, batch(1), numbers[1])
    assert_same(pipe, batch(2), numbers[2])
    assert captures(pipe) == 3
    assert autopipe.explain_captures(pipe).entries[-1].why == (
        f"argument number: {numbers[1]} → {numbers[2]}"
    )


def test_a_number_and_a_length() -> None:
    pipe = autopipe.compile(Net(lambda h, w: h.mean() * w), 2, 3)
    for n, (length, number) in enumerate([(3, 0.1), (4, 0.2), (5, 0.3), (6, 0.1)]):
        assert_same(pipe, batch(n, length), number)
    assert captures(pipe) == 2


def test_a_length_beside_a_number_that_must_be_a_constant() -> None:
    pipe = autopipe.compile(Net(lambda h, n: nn.functional.leaky_relu(h, n)), 2, 3)
    assert_same(pipe, batch(0), 0.1)
    with pytest.warns(UserWarning, match="any number there"):
        assert_same(pipe, batch(1, 4), 0.2)
    for n, length in enumerate((5, 6, 7)):
        assert_same(pipe, batch(n, length), 0.2)
    assert captures(pipe) == 2


def test_the_same_number_is_no_reason_and_no_warning() -> None:
    pipe = autopipe.compile(Net(lambda h, w: h.mean() * w), 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for n in range(4):
            assert_same(pipe, batch(n), 0.5)
        assert captures(pipe) == 1
        for n in range(4):
            assert_same(pipe, batch(n), 0.1 * n)
    assert captures(pipe) == 2


@pytest.mark.filterwarnings("ignore:number:UserWarning")
def test_values_that_compare_in_their_own_way() -> None:
    """nan is not equal to itself, 0.0 is equal to -0.0, True is equal to 1."""
    pipe = autopipe.compile(Net(lambda h, w: h.abs().mean() * math.copysign(2.0, w)), 2, 3)
    for w in (0.0, -0.0, math.nan, math.nan):
        assert_same(pipe, batch(0), w)
    assert captures(pipe) == 3
    pipe = autopipe.compile(Net(lambda h, w: h * 2 if w is True else h * w), 2, 3)
    for number in (1, 3, 4, 1.0):
        assert_same(pipe, batch(0), number)
    with pytest.warns(UserWarning, match="captured once more|captured 4 times"):
        assert_same(pipe, batch(0), True)


def test_a_nan_takes_no_captured_branch() -> None:
    pipe = autopipe.compile(Net(lambda h, w: h * 2 if w > 0 else h * 3), 2, 3)
    for number in (1.0, 2.0, math.inf, math.nan):
        assert torch.equal(pipe(batch(0), number), pipe.model(batch(0), number))
    assert captures(pipe) == 4


def test_rules_that_hold_for_finite_numbers_only() -> None:
    pipe = autopipe.compile(Net(lambda h, w: h * 2 if w != w else h + (w - w)), 2, 3)
    for number in (1.0, 2.0, math.nan, math.inf):
        torch.testing.assert_close(
            pipe(batch(0), number), pipe.model(batch(0), number), equal_nan=True
        )
    assert captures(pipe) == 4


LIMITS: dict[str, tuple[Callable[[Tensor, Any], Any], list[Any], Any]] = {
    "one over it": (lambda h, n: h * (1 / n), [1.0, 2.0, 4.0], 0.0),
    "an integer over it": (lambda h, n: h / 3 * (3 / n), [1, 2, 3], 0),
    "a large power": (lambda h, n: h * n**2, [1.0, 2.0, 3.0], 1e200),
    "a large exponent": (lambda h, n: h * 2.0**n, [1.0, 2.0, 3.0], 2000.0),
    "a large sum": (lambda h, n: h * ((n + n) / 1e19), [1, 2, 3], 2**62 + 5),
    "a large integer": (lambda h, n: h * (2**n / 1e20), [1, 2, 3], 70),
}


@pytest.mark.parametrize(("f", "numbers", "beyond"), LIMITS.values(), ids=LIMITS)
def test_where_python_computes_otherwise(
    f: Callable[[Tensor, Any], Any], numbers: list[Any], beyond: Any
) -> None:
    """Python has no inf from a division, and integers of any size."""
    pipe = autopipe.compile(Net(f), 2, 3)
    for number in numbers:
        assert_same(pipe, batch(0), number)
    assert captures(pipe) == 2
    try:
        pipe.model(batch(0), beyond)
    except (ZeroDivisionError, OverflowError):
        with pytest.raises(autopipe.errors.CaptureError):
            pipe(batch(0), beyond)
    else:
        assert_same(pipe, batch(0), beyond)


@pytest.mark.filterwarnings("ignore:number:UserWarning")
def test_a_text_that_tells_the_number() -> None:
    pipe = autopipe.compile(Net(lambda h, w: {f"x{w}": h.mean() * w, "text": f"at{w}"}), 2, 3)
    for w in (0.1, 0.2, 0.3):
        out = pipe(batch(0), w)
        assert [*out] == [f"x{w}", "text"]
        assert out["text"] == f"at{w}"


def test_numbers_in_containers() -> None:
    pipe = autopipe.compile(Net(lambda h, all_: h * all_["w"][0] + all_["w"][1]), 2, 3)
    for n in range(4):
        assert_same(pipe, batch(n), {"w": (0.5 + n, n)})
    assert captures(pipe) == 2


def test_verify_and_the_other_modes() -> None:
    pipe = autopipe.compile(Net(lambda h, w: h.square().mean() * w), 2, 3)
    for w in (0.1, 0.2, 0.3):
        pipe(batch(0), w)
    assert pipe.verify(batch(1), 0.7)
    with torch.no_grad():
        torch.testing.assert_close(pipe(batch(2), 0.9), pipe.model(batch(2), 0.9))
    pipe.eval()
    torch.testing.assert_close(pipe(batch(2), 0.9), pipe.model(batch(2), 0.9))


def test_helpers() -> None:
    leaves = [torch.ones(2), 0.5, True, 3, 2**70, "text", None]
    constants = number_keys(leaves)
    assert [*constants] == [1, 3]
    assert changed_numbers([*leaves[:3], 4, *leaves[4:]], constants) == [3]
    found = as_tensors(leaves, {1, 3})
    assert [(x.dtype, x.item()) for x in (found[1], found[3])] == [
        (torch.float64, 0.5),
        (torch.int64, 3),
    ]
    assert found[4:] == leaves[4:]


def test_the_warning_names_the_line() -> None:
    pipe = autopipe.compile(Net(lambda h, n: h * round(n, 1)), 2, 3)
    pipe(batch(0), 0.15)
    with pytest.warns(UserWarning, match=r"test_call_numbers\.py:\d+\)"):
        pipe(batch(0), 0.25)
