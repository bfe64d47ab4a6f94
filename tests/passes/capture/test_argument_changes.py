"""Objects that are passed to a model: what they hold, what a forward changes of them."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from autopipe.passes.capture.argument_changes import describe_changes, entries
from tests.support.agreement import assert_close


class Net(nn.Module):
    """``forward(x, given)`` passes the hidden layer through ``use(hidden, given)``."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.use = use
        self.double()

    def forward(self, x: Tensor, given: Any) -> Tensor:
        return self.b(self.use(self.a(x).tanh(), given))


def batch() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Scaling:
    scale = 2.0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Called:
    """Is passed itself, or one of its methods."""

    scale = 2.0

    def __init__(self) -> None:
        self.scale = 2.0

    def method(self, h: Tensor) -> Tensor:
        return h * self.scale


called, made, box = Called(), types.ModuleType("made"), {0: 2.0}
made.scale = 2.0  # type: ignore[attr-defined]


def closure(h: Tensor) -> Tensor:
    return h * box[0]


# name → (what the forward does, what it is passed in each call, how that changes in between)
KEPT: dict[str, tuple[Callable[..., Tensor], Callable[[], Any], Callable[[Any], None]]] = {
    "method": (lambda h, f: f(h), lambda: called.method, lambda p: p.setattr(called, "scale", 3.0)),
    "function": (lambda h, f: f(h), lambda: closure, lambda p: p.setitem(box, 0, 3.0)),
    "class": (
        lambda h, c: h * c.scale,
        lambda: Scaling,
        lambda p: p.setattr(Scaling, "scale", 3.0),
    ),
    "module": (lambda h, m: h * m.scale, lambda: made, lambda p: p.setattr(made, "scale", 3.0)),
    "class of an object": (
        lambda h, o: h * o.scale + o.tensor,
        lambda: Scaling(batch()),
        lambda p: p.setattr(Scaling, "scale", 3.0),
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_change_of_what_is_passed_by_identity_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline went on with what the object was at the first call."""
    use, given, change = KEPT[name]
    model, x = Net(use), batch()
    pipe = autopipe.compile(model, 2, 2)
    assert_close(pipe(x, given()), model(x, given()))
    change(monkeypatch)
    assert_close(pipe(x, given()), model(x, given()))


class Text(str):
    scale = 2.0


class Listed(list[Any]):
    scale = 2.0


class Mapped(dict[str, Any]):
    scale = 2.0


@pytest.mark.parametrize(
    "make", [lambda: Text("a"), Listed, lambda: Mapped(x=batch())], ids=["text", "list", "dict"]
)
def test_attributes_of_texts_and_containers_are_compared(make: Callable[[], Any]) -> None:
    model, x = Net(lambda h, given: h * given.scale), batch()
    pipe = autopipe.compile(model, 2, 2)
    assert_close(pipe(x, make()), model(x, make()))
    other = make()
    other.scale = 3.0
    pipe.capture(x, other)
    assert_close(pipe(x, other), model(x, other))


def add_entry(h: Tensor, given: Any) -> Tensor:
    given["h"] = h
    return given["h"]


def append(h: Tensor, given: Any) -> Tensor:
    given.append(h)
    return h


def set_attribute(h: Tensor, given: Any) -> Tensor:
    given.hidden = h
    return h


def pop(h: Tensor, given: Any) -> Tensor:
    return h + given.pop("x")


WRITTEN: dict[str, tuple[Callable[..., Tensor], Callable[[], Any], str]] = {
    "entry": (add_entry, dict, r"args\[1\]\['h'\]"),
    "item": (append, list, r"args\[1\]\[0\]"),
    "attribute": (set_attribute, lambda: Scaling(batch()), r"args\[1\].hidden"),
    "entry that is taken out": (pop, lambda: {"x": batch()}, r"args\[1\]\['x'\]"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_forward_leaves_in_an_argument_is_named(name: str) -> None:
    """It was lost without a word."""
    use, make, place = WRITTEN[name]
    model, x = Net(use), batch()
    pipe = autopipe.compile(model, 2, 2)
    with pytest.warns(UserWarning, match=f"changes its arguments .{place}.*return"):
        found = pipe(x, make())
    assert_close(found, model(x, make()))


def count_entry(h: Tensor, given: Any) -> Tensor:
    given["n"] += 1
    return h * given["n"]


def count_attribute(h: Tensor, given: Any) -> Tensor:
    given.n += 1
    return h * given.n


@pytest.mark.parametrize(
    ("use", "given"),
    [
        (count_entry, {"n": 0}),
        (count_entry, collections.OrderedDict(n=0)),
        (count_attribute, types.SimpleNamespace(n=0)),
        (count_attribute, types.SimpleNamespace(n=0, x=batch())),
    ],
    ids=["dict", "ordered dict", "object", "object with a tensor"],
)
def test_a_number_that_a_forward_counts_in_an_argument_is_refused(use: Any, given: Any) -> None:
    """Each trace counted an object's number on; the pipeline never did."""
    pipe = autopipe.compile(Net(use), 2, 2)
    with pytest.raises(CaptureError, match="n"):
        pipe(batch(), given)
    assert (given["n"] if isinstance(given, dict) else given.n) == 0


def test_the_entries_of_a_call_have_places() -> None:
    x = batch()
    found = entries(([x, {"a": 1}],), {"scale": 2.0})
    assert found == {"args[0][0]": x, "args[0][1]['a']": 1, "kwargs['scale']": 2.0}
    assert describe_changes(found, found) == ()
