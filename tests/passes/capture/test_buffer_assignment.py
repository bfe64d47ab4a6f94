"""Buffers that a forward assigns: once a step, as if the whole batch had been seen at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.errors import UnsupportedError
from tests.support.agreement import assert_agrees, assert_close, objective, pipelined
from tests.support.holding import Holds, assert_steps_agree, batches, counts, deep, every_remat, x

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("traces_once")]

# ------------------------------------------------------------------------------- assigned


def averages(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    if s.training:
        with torch.no_grad():
            s.a = 0.9 * s.a + 0.1 * y.mean(0)
    return y


def averages_outside_of_no_grad(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    s.a = 0.9 * s.a + 0.1 * y.detach().mean(0)
    return y.sin()


def swaps(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x) * s.a
    s.a, s.b = s.b, s.a
    return y + s.b.sin()


def hands_on(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x) + s.a
    s.a, s.b = s.b + 1, s.a * 2
    return y


def twice(s: Any, x: Tensor) -> Tensor:
    s.a = s.a * 2
    y = s.layer(x) * s.a
    s.a = s.a + 1
    return y + s.a


def in_place_and_assigned(s: Any, x: Tensor) -> Tensor:
    s.a.add_(1)
    y = s.layer(x) * s.a
    s.a = s.a.clone()
    s.a.mul_(0.5)
    return y


def registers_again(s: Any, x: Tensor) -> Tensor:
    s.register_buffer("a", s.a + 1)
    return s.layer(x) * s.a


def returns_the_old(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    before = s.a
    s.a = s.a + 1
    return s.layer(x), before


ASSIGNING = [
    counts,
    averages,
    averages_outside_of_no_grad,
    swaps,
    hands_on,
    twice,
    in_place_and_assigned,
    registers_again,
]


@every_remat
@pytest.mark.parametrize("f", ASSIGNING)
def test_an_assigned_buffer_changes_once_a_step(f: Any, remat: str) -> None:
    assert_steps_agree(deep(f), *batches(), devices=2, remat=remat)


@pytest.mark.parametrize("f", ASSIGNING)
def test_in_one_micro_batch_too(f: Any) -> None:
    assert_steps_agree(Holds(f), *batches(), chunks=1)


def test_it_stays_the_same_object() -> None:
    model = Holds(counts)
    before = dict(model.named_buffers())
    pipelined(model)(x())
    assert all(model.get_buffer(name) is b for name, b in before.items())
    assert model.n == 1


def test_in_a_submodule() -> None:
    assert_steps_agree(nn.Sequential(Holds(counts), nn.Tanh(), Holds(averages)), *batches())


def test_the_value_before_may_be_returned() -> None:
    for chunks in (1, 3):
        assert_agrees(pipelined(Holds(returns_the_old), chunks=chunks, devices=1), x())


def test_without_deferral_each_micro_batch_assigns() -> None:
    model = Holds(averages)
    twin = copy.deepcopy(model)
    pipelined(model, devices=1, batch_norm="micro")(x())
    for chunk in x().tensor_split(3):
        twin(chunk)
    assert_close(model.a, twin.a)


def test_verify_compares_it_and_puts_it_back() -> None:
    model = Holds(averages)
    before = {n: (b, b.clone()) for n, b in model.named_buffers()}
    pipe = pipelined(model, args=(x(),))
    found = pipe.verify(x())
    assert found.ok
    assert all(model.get_buffer(n) is b for n, (b, _) in before.items())
    assert all(torch.equal(b, value) for b, value in before.values())
    changed = [d for d in found.differences if d.name == "a"]
    twin = copy.deepcopy(model)
    twin(x())
    assert changed[0].scale == twin.a.abs().max().item() != before["a"][1].abs().max().item()


def test_tied_buffers_that_are_assigned_together() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Holds(averages), Holds(averages)
            self.other.n = self.one.n

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x) * self.one.n
            self.one.n = self.other.n = self.one.n + 1
            return y + self.other(x) * self.other.n

    assert_steps_agree(Both(), *batches())


def unties(s: Any, x: Tensor) -> Tensor:
    s.a = s.b
    return s.layer(x) * s.a


def shows(s: Any, x: Tensor) -> Tensor:
    s.a = s.table[0]
    return s.layer(x) * s.a


@pytest.mark.parametrize("f", [unties, shows])
def test_buffers_that_become_one_are_refused(f: Any) -> None:
    """In eager torch the next write to one of them changes the other."""
    with pytest.raises(UnsupportedError, match="share memory") as caught:
        pipelined(Holds(f))(x())
    assert "a" in str(caught.value.found)
    assert "copy_" in str(caught.value.remedy)


@pytest.mark.parametrize("f", ASSIGNING)
@pytest.mark.parametrize("remat", ["full", "none"])
def test_in_micro_batches_what_was_read_is_kept_for_the_backward(f: Any, remat: str) -> None:
    model = Holds(f)
    twin = copy.deepcopy(model)
    pipe = pipelined(model, devices=1, batch_norm="micro", remat=remat)
    objective(pipe(x())).backward()
    objective(torch.cat([twin(chunk) for chunk in x().tensor_split(3)])).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad, name)
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert_close(b, c, name)
