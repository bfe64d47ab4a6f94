"""What a forward leaves in its modules' attributes: harmless, or a reason to refuse.

Covers capture/patches.py: hooks that return nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from tests.support.agreement import assert_agrees, assert_close, objective, pipelined


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


def x(seed: int = 0) -> Tensor:
    return torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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
        (carries_in_a_list, "seen['all']"),
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
    with pytest.warns(UserWarning, match=r"sets steps, last, seen\['all'\]; the pipeline"):
        pipe = pipelined(model, args=(x(),))
    assert_agrees(pipe, x())
    assert (model.steps, model.last, model.seen) == (0, None, {"all": []})
    assert not hasattr(model, "made"), "nothing that was made while tracing stays"


def counts_and_returns_sizes(s: Any, x: Tensor) -> Any:
    s.steps += 1
    if s.steps > 1:
        x = x.clone()  # another graph, the same values: real calls decide
    return s.layer(x).sin(), x.shape[0]


@pytest.mark.filterwarnings("ignore:the model's forward sets steps")
def test_a_size_that_is_returned_is_that_of_each_batch() -> None:
    """Not that of the two samples on which real calls are compared."""
    pipe = pipelined(Keeps(counts_and_returns_sizes))
    assert pipe(x())[1] == 7
    assert pipe(x()[:3])[1] == 3


def caches(s: Any, x: Tensor) -> Tensor:
    if s.steps < x.shape[1]:
        s.steps = x.shape[1]
    return s.layer(x).sin()


def caches_a_table(s: Any, x: Tensor) -> Tensor:
    if s.table is None:
        s.table = torch.arange(4, dtype=x.dtype).sin()
    return s.layer(x) * s.table


def test_hooks_that_the_first_call_installs_are_taken_back_with_its_flag() -> None:
    """As transformers collects hidden states. With the flag alone gone, the next call would install
    them once more, and collect everything twice."""

    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            found: list[Tensor] = []
            self.collect = found.append
            if not getattr(self, "installed", False):
                for layer in self.layers:
                    layer.register_forward_hook(lambda m, args, out: self.collect(out))
                self.installed = True
            for layer in self.layers:
                x = layer(x).tanh()
            return torch.cat(found, 1)

    model = Collects()
    before = copy.deepcopy(model)
    assert pipelined(model, args=(x(),))(x()).shape == (7, 12)
    assert not any(m._forward_hooks for m in model.modules())
    found = pipelined(model)(x())
    torch.testing.assert_close(found, before(x()))
    torch.testing.assert_close(model(x()), before(x()))
    torch.testing.assert_close(pipelined(model)(x()), found)


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


def carries_an_average(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    now = y.detach().mean(0)
    s.table = now if s.table is None else 0.9 * s.table + 0.1 * now
    return y - s.table.sum()


def test_a_state_that_the_same_samples_leave_as_it_is() -> None:
    """An average of equal values is that value: two calls on the same samples agree."""
    with pytest.raises(CaptureError, match="keeps state"):
        pipelined(Keeps(carries_an_average), out_reduce="mean", chunks=1)(x())


# ------------------------------------------------------------------------------- buffers


class KeepsBuffers(Keeps):
    """`table` is a buffer, and so is `count`."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(f)
        del self.table
        self.register_buffer("table", None)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_one", torch.ones(4, dtype=torch.float64), persistent=False)


def registers_a_table(s: Any, x: Tensor) -> Tensor:
    if not hasattr(s, "made"):
        s.register_buffer("made", torch.arange(4, dtype=x.dtype).sin(), persistent=False)
    return s.layer(x) * s.made


def grows_a_table(s: Any, x: Tensor) -> Tensor:
    if s.last_one.numel() < 2 * x.shape[1]:
        s.last_one = torch.arange(2 * x.shape[1], dtype=x.dtype).cos()
    return s.layer(x) * s.last_one[: x.shape[1]]


def remakes_a_table(s: Any, x: Tensor) -> Tensor:
    del s.count
    s.table = torch.arange(4, dtype=x.dtype).sin()
    s.register_buffer("count", torch.zeros((), dtype=torch.long))
    return s.layer(x) * s.table


@pytest.mark.parametrize("f", [caches_a_table, registers_a_table, grows_a_table, remakes_a_table])
@pytest.mark.filterwarnings("ignore:the model's forward sets table")
def test_a_buffer_made_in_the_first_call_is_made_in_every_one(f: Any) -> None:
    """It was a FakeTensor after the capture: in state_dict, in the model's own results."""
    model = nn.Sequential(nn.Linear(4, 4).double(), KeepsBuffers(f))
    held = model[1]
    before, passing = dict(held._buffers), set(held._non_persistent_buffers_set)
    twin = copy.deepcopy(model)
    pipe = pipelined(model)
    for seed in range(2):
        expected = twin(x(seed))
        assert_close(pipe(x(seed)), expected)
        objective(expected).backward()
        objective(pipe(x(seed))).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad, name)
    assert list(held._buffers.items()) == list(before.items()), "same names, order and objects"
    assert held._non_persistent_buffers_set == passing
    assert all(d.ok for d in pipe.verify(x()).differences if d.kind != "buffer")
    assert list(held._buffers.items()) == list(before.items())
    assert type(model(x())) is Tensor


def averages(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    now = y.detach().mean(0)
    s.table = now if s.table is None else 0.9 * s.table + 0.1 * now
    return y


def averages_in_place(s: Any, x: Tensor) -> Tensor:
    if s.table is None:
        s.table = torch.zeros(4, dtype=x.dtype)
    s.table += 1
    return s.layer(x)


def turns_into_floats(s: Any, x: Tensor) -> Tensor:
    s.count = s.count + 1.5
    return s.layer(x)


def collects(s: Any, x: Tensor) -> Tensor:
    s.last_one = torch.cat([s.last_one, s.last_one[:1]])
    return s.layer(x)


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (averages, "table"),
        (averages_in_place, "table"),
        (turns_into_floats, "count"),
        (collects, "last_one"),
    ],
)
def test_a_buffer_that_later_calls_change_is_refused(f: Any, name: str) -> None:
    """Though no result depends on it, a checkpoint does."""
    model = KeepsBuffers(f)
    before = dict(model._buffers)
    with pytest.raises(CaptureError, match="keeps state") as caught:
        pipelined(model)(x())
    assert caught.value.found == name
    assert dict(model._buffers) == before


def starts_once(s: Any, x: Tensor) -> Tensor:
    if s.steps == 0:
        s.last_one = x.detach().mean(0)
        s.steps = 1
    return s.layer(x)


def starts_once_in_place(s: Any, x: Tensor) -> Tensor:
    if s.steps == 0:
        s.last_one.copy_(x.detach().mean(0))
        s.steps = 1
    return s.layer(x)


@pytest.mark.parametrize("f", [starts_once, starts_once_in_place])
def test_a_buffer_that_the_first_call_writes_and_no_other_is_refused(f: Any) -> None:
    model = KeepsBuffers(f)
    with pytest.raises(CaptureError, match="keeps state"):
        pipelined(model)(x())
    assert torch.equal(model.last_one, torch.ones(4, dtype=torch.float64))


def test_a_failing_forward_leaves_the_buffers() -> None:
    def f(s: Any, x: Tensor) -> Tensor:
        s.table = x.sum(0)
        raise ValueError("no")

    model = KeepsBuffers(f)
    with pytest.raises(CaptureError, match="cannot capture"):
        pipelined(model)(x())
    assert model.table is None


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
