"""A forward that cannot be captured: the reason, the line, and advice that helps.

Covers capture/explain.py (beside test_model.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from autopipe.passes.capture.failures import OTHER, REASONS, reason_for
from tests.support.programs import user_line

pytestmark = pytest.mark.few(4)

X = torch.rand(6, 4) + 0.5


class Model(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x * 2)


def asserted(y: Tensor) -> Tensor:
    assert not torch.isnan(y).any()  # line of asserted
    return y


def raising(y: Tensor) -> Tensor:
    if not torch.isfinite(y).all():  # line of raising
        raise ValueError("a value that is not finite")
    return y


def as_number(y: Tensor) -> Tensor:
    return y / float(y.abs().max())  # line of as_number


def branching(y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y  # line of branching


def formatted(y: Tensor) -> Tensor:
    _ = f"{y.mean().item():.3f}"  # line of formatted
    return y


def tensor_formatted(y: Tensor) -> Tensor:
    _ = f"{y.mean():.3f}"  # line of tensor_formatted
    return y


def elsewhere(y: Tensor) -> Tensor:
    return y + torch.ones(4, device="meta")  # line of elsewhere


def in_numpy(y: Tensor) -> Tensor:
    return y + torch.from_numpy(y.numpy())  # line of in_numpy


def other_dtype(y: Tensor) -> Tensor:
    return nn.functional.embedding(y, torch.ones(9, 2))  # line of other_dtype


def other_shape(y: Tensor) -> Tensor:
    return y @ torch.ones(3, 2)  # line of other_shape


CASES: dict[Callable[[Tensor], Tensor], tuple[str, str]] = {
    asserted: ("checks the values", "is_compiling"),
    as_number: ("into a Python number", r"leave out float\(\)"),
    branching: ("control flow", r"torch\.where"),
    formatted: ("into a text", "is_compiling"),
    tensor_formatted: ("into a text", "is_compiling"),
    elsewhere: ("a device of its own choice", r"device=x\.device"),
    in_numpy: ("to NumPy", "outside of the model"),
    other_dtype: ("these dtypes", r"torch\.long"),
    other_shape: ("these shapes", "shape of the input"),
}


@pytest.mark.parametrize("compute", CASES, ids=lambda f: f.__name__)
def test_the_reason_and_the_line_are_told(compute: Callable[[Tensor], Tensor]) -> None:
    problem, remedy = CASES[compute]
    with pytest.raises(CaptureError, match=problem) as caught:
        autopipe.compile(Model(compute), 1, 2)(X)
    assert caught.value.source == user_line(compute, f"# line of {compute.__name__}")
    assert re.search(remedy, str(caught.value.remedy))


@pytest.mark.parametrize("compute", [asserted, raising, formatted, tensor_formatted])
def test_what_the_advice_guards_runs_in_eager_only(compute: Callable[[Tensor], Tensor]) -> None:
    seen: list[bool] = []

    def guarded(y: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            seen.append(True)
            return compute(y)
        return y

    model = Model(guarded)
    assert torch.equal(autopipe.compile(model, 1, 2)(X), compute(X * 2))
    assert seen == []
    assert torch.equal(model(X), compute(X * 2))
    assert seen == [True]


@pytest.mark.parametrize(
    "layers",
    [nn.Linear(4, 2), nn.Sequential(nn.Conv1d(4, 2, 1), nn.ReLU())],
    ids=["linear", "conv"],
)
def test_an_input_without_a_batch_dimension(layers: nn.Module) -> None:
    """One sample as it is: eager takes it, a pipeline says how to make a batch of it."""
    x = torch.randn(4) if isinstance(layers, nn.Linear) else torch.randn(4, 5)
    eager: Callable[[Tensor], Any] = layers
    expected = eager(x)
    pipe = autopipe.compile(layers, 1, 2)
    with pytest.raises(CaptureError, match=r"x\.unsqueeze\(0\)") as caught:
        pipe(x)  # this line
    here = user_line(test_an_input_without_a_batch_dimension, "# this " + "line")
    assert caught.value.source == here
    assert str(tuple(x.shape)) in str(caught.value.found)
    torch.testing.assert_close(pipe(x.unsqueeze(0))[0], expected)


def test_a_dimension_that_in_dims_does_not_name() -> None:
    recurrent, x = nn.LSTM(4, 3), torch.randn(5, 6, 4)
    with pytest.raises(CaptureError, match="in_dims=1"):
        autopipe.compile(recurrent, 1, 2)(x)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {"y": X}), ((X, X), {}), ((X,), {"y": X})],
    ids=["few", "many", "more"],
)
def test_a_call_with_other_arguments(args: Any, kwargs: Any) -> None:
    """The line is that of the call: no line of the model is reached."""
    pipe = autopipe.compile(Model(torch.sin), 1, 2)
    with pytest.raises(CaptureError, match="arguments of the model's forward") as caught:
        pipe(*args, **kwargs)  # the call
    assert caught.value.source == user_line(test_a_call_with_other_arguments, "# the " + "call")
    assert "step(x, target=y)" in str(caught.value.remedy)


def test_an_unknown_failure_says_where_to_look() -> None:
    assert reason_for("KeyError: 'x'", "") is OTHER
    assert len({r.problem for r in (*REASONS, OTHER)}) == len(REASONS) + 1


def test_a_forward_that_prints_is_warned_of() -> None:
    def printing(y: Tensor) -> Tensor:
        print(y.shape)  # printed here
        return y

    model = Model(printing)
    pipe = autopipe.compile(model, 1, 2)
    line = user_line(printing, "# printed " + "here")
    with pytest.warns(UserWarning, match="prints") as caught:
        assert torch.equal(pipe(X), X * 2)
    (warning,) = caught
    assert line in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error")
        pipe(X)


class WithWeights(nn.Module):
    """Its forward fails, or not."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.compute = nn.Linear(4, 4), compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self.layer(x))


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("compute", "problem"),
    [
        (lambda y: y + y.numpy().sum(), "gives a tensor to NumPy"),
        (lambda y: y @ torch.ones(3, 3, device=y.device), "does not accept these shapes"),
    ],
    ids=["numpy", "shapes"],
)
def test_weights_on_another_device_do_not_hide_the_reason(
    compute: Callable[[Tensor], Tensor],
    problem: str,
    place: str,
) -> None:
    """Fakes take the place of weights on meta, and of those on another device than the call's."""
    with torch.device(place):
        model, x = WithWeights(compute), torch.ones(6, 4)
    with pytest.raises(CaptureError, match=problem):
        autopipe.plan(model, ["cpu"] * 2, 2, args=(x,))
