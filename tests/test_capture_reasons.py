"""Why calls are captured: what changed, from what to what, and what one can do.

Covers autopipe/capture_log.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import OptionError

X = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """With a weight of the loss, a mask and labels that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.0)
        self.power = 1.0

    def forward(
        self, x: Tensor, beta: Any = 1.0, mask: Tensor | None = None, labels: Any = None
    ) -> Any:
        beta = float(beta) if isinstance(beta, str) else beta
        found = self.b(self.drop(self.a(x.float()).tanh()) ** self.power) * beta
        found = found if mask is None else found * mask
        return found if labels is None else (found - labels).square().mean()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def reasons(pipe: Any) -> list[str]:
    return [e.why for e in autopipe.explain_captures(pipe).entries]


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "length": (lambda p: p(torch.randn(6, 5, 4), 1.0), "dimension 1 of x: 3 → 5"),
    "value": (lambda p: p(X, 2.0), "argument beta: 1.0 → 2.0"),
    "dtype": (
        lambda p: p(X.double(), 1.0),
        "argument x: float32 3-d → float64 3-d",
    ),
    "structure": (
        lambda p: p(X, 1.0, mask=torch.ones(6, 3, 2)),
        "arguments: pipe(float32 3-d, 1.0) → pipe(float32 3-d, 1.0, mask=float32 3-d)",
    ),
    "mode": (lambda p: p.eval()(X, 1.0), "mode: training → evaluation"),
    "mode of a layer": (
        lambda p: (p.model.drop.eval(), p(X, 1.0)),
        "mode of a Dropout: training → evaluation",
    ),
    "attribute": (
        lambda p: (setattr(p.model, "power", 3.0), p(X, 1.0)),
        "attribute power of Net: 1.0 → 3.0",
    ),
    "attribute of a layer": (
        lambda p: (setattr(p.model.drop, "p", 0.5), p(X, 1.0)),
        "attribute p of Dropout: 0.0 → 0.5",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed(name: str) -> None:
    change, expected = CHANGES[name]
    pipe = autopipe.compile(Net(), 2, 3)
    pipe(X, 1.0)
    assert reasons(pipe) == ["the first call"]
    change(pipe)
    assert len(reasons(pipe)) == 2
    assert reasons(pipe)[1].startswith(expected)


class Scaled(Net):
    """With an attribute that is an object."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = torch.ones(())

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * self.scale)


def test_another_object() -> None:
    """It is told by its type: texts of objects have addresses."""
    model = Scaled()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    pipe(X)
    model.scale = torch.zeros(())
    torch.testing.assert_close(pipe(X), model(X))
    assert reasons(pipe)[1:] == ["attribute scale of Scaled: another Tensor"]


def test_a_setting_of_torch() -> None:
    pipe = autopipe.compile(Net(), 2, 3)
    pipe(X)
    torch.use_deterministic_algorithms(True)
    try:
        pipe(X)
    finally:
        torch.use_deterministic_algorithms(False)
    assert reasons(pipe)[1] == "torch.are_deterministic_algorithms_enabled(): False → True"


def test_the_most_similar_capture_is_compared() -> None:
    pipe = autopipe.compile(Net(), 2, 3)
    pipe(X)
    pipe.eval()(X)
    pipe.train()(X, 2.0)
    pipe.eval()(torch.randn(6, 5, 4))
    assert reasons(pipe)[-1] == "dimension 1 of x: 3 → 5"


def test_the_report() -> None:
    pipe = autopipe.compile(Net(), 2, 3)
    assert str(autopipe.explain_captures(pipe)) == "nothing has been captured yet"
    pipe(X)
    pipe(torch.randn(6, 5, 4))
    pipe(torch.randn(6, 7, 4))
    report = autopipe.explain_captures(pipe)
    first, second = report.entries
    assert report.count == 2
    assert (first.number, first.lengths, first.programs) == (1, (), 1)
    assert (second.number, second.lengths, second.programs) == (2, ("x_dim1",), 1)
    assert all(s > 0 for e in report.entries for s in (e.capture, e.cut, e.trace))
    head, *rows = str(report).splitlines()
    assert head.split() == ["capture", "seconds", "cut", "trace", "programs", "lengths", "why"]
    assert rows[0].endswith("1  -        the first call")
    assert rows[1].endswith("1  x_dim1   dimension 1 of x: 3 → 5")
    assert pipe.explain().splitlines()[-1] == (
        "captures: 2; autopipe.explain_captures(pipe) says why"
    )


def test_the_report_of_something_else() -> None:
    with pytest.raises(OptionError, match="this is no pipeline"):
        autopipe.explain_captures(nn.Linear(4, 4))  # type: ignore[arg-type]


def agrees(pipe: Any, *args: Any, **kwargs: Any) -> None:
    """Values and gradients are those of the model itself."""
    model = pipe.model
    found = []
    for module in (model, pipe):
        model.zero_grad()
        result = module(*args, **kwargs)
        result.square().sum().backward()
        found.append([result, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0])


def test_a_text_that_changes_is_one_warning() -> None:
    pipe = autopipe.compile(Net(), 2, 3, cache_size=3)
    agrees(pipe, X, beta="0.1")
    with pytest.warns(UserWarning, match=r"argument beta: '0\.1' → '0\.2'.*as a tensor.*said once"):
        agrees(pipe, X, beta="0.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(pipe, X, beta="0.3")
        agrees(pipe, X, beta="0.2")
    with pytest.warns(UserWarning, match="captured 4 times"):
        agrees(pipe, X, beta="0.4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5, 9):
            agrees(pipe, X, beta=str(step / 10))
    assert len(pipe._programs._models._keys) == 3


def test_a_number_passed_as_a_tensor_costs_nothing() -> None:
    """The remedy that the warning names."""
    pipe = autopipe.compile(Net(), 2, 3, in_dims={"x": 0, "beta": None})
    for beta in (0.1, 0.2, 0.3):
        agrees(pipe, X, beta=torch.tensor(beta))
    assert len(reasons(pipe)) == 1


def test_an_argument_that_is_none_at_first() -> None:
    pipe = autopipe.compile(Net(), 2, 3)
    agrees(pipe, X, mask=None)
    with pytest.warns(UserWarning, match="argument mask: None → float32 3-d: .*captured once more"):
        agrees(pipe, X, mask=torch.rand(6, 3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(pipe, X, mask=torch.rand(6, 3, 2))
        agrees(pipe, X, mask=None)
    assert len(reasons(pipe)) == 2


def test_labels_for_evaluation_and_none_for_prediction() -> None:
    pipe = autopipe.compile(Net(), 2, 3).eval()
    agrees(pipe, X, labels=torch.rand(6, 3, 2))
    with pytest.warns(UserWarning, match="captured once more"):
        agrees(pipe, X)
    agrees(pipe, X, labels=torch.rand(6, 3, 2))
    assert len(reasons(pipe)) == 2
