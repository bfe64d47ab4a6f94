"""What a forward leaves in its modules' attributes: harmless, or a reason to refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from tests.agreement import assert_agrees, pipelined


class Keeps(nn.Module):
    """``forward(self, x)`` is `f`; it may leave things in `steps`, `seen`, `last` and `table`."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.steps = 0
        self.seen: dict[str, list[Tensor]] = {"all": []}
        self.last: Tensor | None = None
        self.table: Tensor | None = None
        self.f = f
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def x() -> Tensor:
    return torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def warms_up(s: Any, x: Tensor) -> Tensor:
    s.steps += 1
    return s.layer(x) * min(1.0, s.steps / 10)


def warms_up_by_a_tensor(s: Any, x: Tensor) -> Tensor:
    s.steps += 1
    return s.layer(x) * torch.tensor(s.steps / 10, dtype=x.dtype)


def carries(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    if s.last is not None:
        y = y + s.last
    s.last = y.detach().mean(0)
    return y


def carries_in_a_list(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x) + len(s.seen["all"])
    s.seen["all"].append(y.detach())
    return y


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (warms_up, "steps"),
        (warms_up_by_a_tensor, "steps"),
        (carries, "last"),
        (carries_in_a_list, "seen"),
    ],
)
def test_a_state_that_the_next_call_would_use_is_refused(f: Any, name: str) -> None:
    model = Keeps(f)
    with pytest.raises(CaptureError, match="keeps state in attributes") as caught:
        pipelined(model)(x())
    assert caught.value.found == name
    assert "register_buffer" in str(caught.value)
    assert (model.steps, model.last, model.seen) == (0, None, {"all": []})


def test_in_a_submodule_it_is_named_by_its_path() -> None:
    model = nn.Sequential(nn.Linear(4, 4).double(), Keeps(warms_up))
    with pytest.raises(CaptureError) as caught:
        pipelined(model)(x())
    assert caught.value.found == "1.steps"


def looks_on(s: Any, x: Tensor) -> Tensor:
    s.steps += 1
    s.last = y = s.layer(x)
    s.seen["all"].append(y.detach())
    s.made = y.shape[0]
    return y.sin()


def test_what_no_call_needs_is_said() -> None:
    """A counter that is printed elsewhere, a result that is kept to be looked at."""
    model = Keeps(looks_on)
    with pytest.warns(UserWarning, match="steps, seen, last, made; as a pipeline it does not"):
        pipe = pipelined(model, args=(x(),))
    assert_agrees(pipe, x())
    assert (model.steps, model.last, model.seen) == (0, None, {"all": []})
    assert not hasattr(model, "made"), "nothing that was made while tracing stays"


def caches(s: Any, x: Tensor) -> Tensor:
    if s.steps < x.shape[1]:
        s.steps = x.shape[1]
    return s.layer(x).sin()


def caches_a_table(s: Any, x: Tensor) -> Tensor:
    if s.table is None:
        s.table = torch.arange(4, dtype=x.dtype).sin()
    return s.layer(x) * s.table


def test_a_cache_of_plain_values_is_no_matter() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_agrees(pipelined(Keeps(caches)), x())


def test_a_table_made_in_the_first_call_is_made_in_every_one() -> None:
    """The graphs of the first and the second call differ; what they compute does not."""
    model = Keeps(caches_a_table)
    assert_agrees(pipelined(model), x())
    assert model.table is None


def test_a_table_that_is_there_already_is_a_constant() -> None:
    model = Keeps(caches_a_table)
    model(x())
    assert_agrees(pipelined(model), x())
    assert model.table is not None


def test_without_weights_nothing_can_be_called_twice() -> None:
    with torch.device("meta"):
        model = Keeps(caches_a_table)
    with pytest.raises(CaptureError, match="keeps state"):
        autopipe.plan(model, 2, 3, args=(x().to("meta"),))


def test_buffers_and_random_numbers_are_as_before_the_two_calls() -> None:
    class Counts(Keeps):
        def __init__(self) -> None:
            super().__init__(caches_a_table)
            self.norm = nn.BatchNorm1d(4).double()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x)) * torch.rand_like(x)

    model = Counts()
    torch.manual_seed(5)
    pipelined(model, args=(x(),))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(model.norm.running_var, torch.ones(4, dtype=torch.float64))
