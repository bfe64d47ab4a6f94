"""What did not exist when the forward looked for it, and what changes how objects behave.

Covers python_state/members.py and python_state/kinds.py.
"""

from __future__ import annotations

import collections
import math
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import CaptureError
from tests.support.agreement import assert_close

FILLED: dict[str, float] = {}
MADE = types.ModuleType("made")
MADE.scale = 2.0  # type: ignore[attr-defined]


class Net(nn.Module):
    """``forward(x)`` multiplies by ``read(self)``."""

    act: Any = staticmethod(torch.tanh)

    def __init__(self, read: Callable[[Any], Any], held: Any = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.read, self.held = read, held
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x))) * self.read(self)


class Default:
    scale = 2.0

    def __call__(self) -> float:
        return 2.0

    def __len__(self) -> int:
        return 2


class Derived(Default):
    pass


class Slotted:
    __slots__ = ("scale",)


class WithBoth(Slotted):
    def __init__(self) -> None:
        self.scale = 2.0


class Record(dict[str, Any]):
    """As configurations often are."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


class Listed(list[float]):
    scale = 2.0


class Number(float):
    scale = 2.0


def function() -> float:
    return 2.0


def other() -> float:
    return 3.0


def with_keyword(*, scale: float = 2.0) -> float:
    return scale


def try_global(net: Any) -> float:
    try:
        return LATER  # type: ignore[name-defined,no-any-return]
    except NameError:
        return 2.0


def kept_for_later(net: Any) -> float:
    if net.held.value is None:
        net.held.value = 2.0
    return float(net.held.value)


def set_held(name: str) -> Callable[[Any, Any], None]:
    return lambda net, patch: setattr(net.held, name, 3.0)


def patched(owner: Any, name: str, value: Any, *, raising: bool = True) -> Callable[..., None]:
    return lambda net, patch: patch.setattr(owner, name, value, raising=raising)


class Two:
    value = 2.0


class Three:
    value = 3.0


weak: weakref.WeakSet[Any] = weakref.WeakSet()

# name → (what the forward reads, what it holds, how that changes)
CASES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any], Callable[[Any, Any], Any]]] = {
    "default of a class": (lambda n: n.held.scale, Default, set_held("scale")),
    "default of a base": (
        lambda n: n.held.scale,
        Derived,
        patched(Derived, "scale", 3.0, raising=False),
    ),
    "getattr of an object": (lambda n: getattr(n.held, "x", 2.0), Default, set_held("x")),
    "function of a module": (
        lambda n: n.extra() if hasattr(n, "extra") else 2.0,
        lambda: None,
        lambda n, _: setattr(n, "extra", other),
    ),
    "method of a class, set in the module": (
        lambda n: 2.0,
        lambda: None,
        lambda n, _: setattr(n, "act", torch.sin),
    ),
    "variable of the file": (
        try_global,
        lambda: None,
        lambda n, p: p.setitem(globals(), "LATER", 3.0),
    ),
    "globals()": (
        lambda n: globals().get("LATER", 2.0),
        lambda: None,
        lambda n, p: p.setitem(globals(), "LATER", 3.0),
    ),
    "dict that was empty": (
        lambda n: FILLED.get("x", 2.0),
        lambda: None,
        lambda n, p: p.setitem(FILLED, "x", 3.0),
    ),
    "first of two mappings": (
        lambda n: n.held["x"],
        lambda: collections.ChainMap({}, {"x": 2.0}),
        lambda n, _: n.held.update(x=3.0),
    ),
    "weak set": (lambda n: 2.0 + len(n.held), lambda: weak, lambda n, _: weak.add(n)),
    "factory": (
        lambda n: n.held.default_factory(),
        lambda: collections.defaultdict(lambda: 2.0),
        lambda n, _: setattr(n.held, "default_factory", lambda: 3.0),
    ),
    "slot beside a dict": (lambda n: n.held.scale, WithBoth, set_held("scale")),
    "attribute dict": (lambda n: n.held.scale, lambda: Record(scale=2.0), set_held("scale")),
    "attribute of a list": (lambda n: n.held.scale, lambda: Listed([1.0]), set_held("scale")),
    "attribute of a number": (lambda n: n.held.scale, lambda: Number(1.0), set_held("scale")),
    "attribute of a function": (
        lambda n: getattr(function, "scale", 2.0),
        lambda: None,
        patched(function, "scale", 3.0, raising=False),
    ),
    "code": (lambda n: function(), lambda: None, patched(function, "__code__", other.__code__)),
    "defaults": (
        lambda n: with_keyword(),
        lambda: None,
        patched(with_keyword, "__kwdefaults__", {"scale": 3.0}),
    ),
    "class": (lambda n: n.held.value, Two, lambda n, _: setattr(n.held, "__class__", Three)),
    "call": (lambda n: n.held(), Default, patched(Default, "__call__", lambda self: 3.0)),
    "length": (lambda n: len(n.held), Default, patched(Default, "__len__", lambda self: 3)),
    "forward": (
        lambda n: 2.0,
        lambda: None,
        patched(Net, "forward", lambda self, x: self.b(self.a(x))),
    ),
    "torch's forward": (
        lambda n: 2.0,
        lambda: None,
        patched(nn.Linear, "forward", lambda self, x: x @ self.weight),
    ),
    "torch's function": (
        lambda n: F.relu(n.a.bias),
        lambda: None,
        patched(F, "relu", lambda x: x.sin()),
    ),
    "Python's function": (
        lambda n: math.sqrt(4.0),
        lambda: None,
        patched(math, "sqrt", lambda x: 3.0),
    ),
    "module that was made": (lambda n: MADE.scale, lambda: None, patched(MADE, "scale", 3.0)),
    "sys.modules": (
        lambda n: sys.modules["made"].scale,
        lambda: None,
        patched(MADE, "scale", 3.0),
    ),
    "what the forward sets if it is missing": (
        kept_for_later,
        lambda: types.SimpleNamespace(value=None),
        lambda n, _: setattr(n.held, "value", 3.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:the model's forward sets")
def test_what_appears_or_acts_otherwise_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but a few went on with what was captured."""
    monkeypatch.setitem(sys.modules, "made", MADE)
    read, held, change = CASES[name]
    model, x = Net(read, held()), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 2, 2)
    assert_close(pipe(x), model(x))
    change(model, monkeypatch)
    expected = model(x)
    assert_close(pipe(x), expected)
    first = pipe.captured
    assert_close(pipe(x), expected)
    assert pipe.captured is first


def test_slots_beside_a_dict_are_restored() -> None:
    """Each trace counted on, and the pipeline went on with the last number."""

    def count(net: Any) -> float:
        net.held.scale += 1.0
        return float(net.held.scale)

    model = Net(count, WithBoth())
    with pytest.raises(CaptureError, match="keeps state"):
        autopipe.compile(model, 2, 2)(torch.randn(6, 4, dtype=torch.float64))
    assert model.held.scale == 2.0


@pytest.mark.filterwarnings("ignore:the model's forward sets")
def test_an_entry_that_the_forward_overwrites_costs_no_capture() -> None:
    """A dict of which the forward overwrites an entry was never like the captured one."""

    def note(net: Any) -> float:
        net.held.seen["width"] = net.a.out_features
        return float(net.held.seen["scale"])

    held = types.SimpleNamespace(seen={"width": 0, "scale": 2.0})
    model, x = Net(note, held), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 2, 2)
    pipe(x)
    first = pipe.captured
    pipe(x)
    assert pipe.captured is first


def test_the_order_of_a_dict_counts() -> None:
    def horner(net: Any) -> float:
        total = 0.0
        for value in FILLED.values():
            total = total * 2 + value
        return total

    FILLED.update(a=1.0, b=3.0)
    try:
        model, x = Net(horner), torch.randn(6, 4, dtype=torch.float64)
        pipe = autopipe.compile(model, 2, 2)
        assert_close(pipe(x), model(x))
        FILLED["a"] = FILLED.pop("a")
        assert_close(pipe(x), model(x))
    finally:
        FILLED.clear()
