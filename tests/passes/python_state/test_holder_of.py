"""Containers of every kind that a forward reads: a change inside of one is noticed.

A pipeline is compared with the model itself after each change. Covers python_state/holder_of.py.
"""

from __future__ import annotations

import array
import collections
import ctypes
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.passes.python_state.holder_of import LARGEST_ARRAY, container_of
from autopipe.passes.python_state.holders import CONTENT, LARGEST_CONTAINER
from tests.support.agreement import assert_close


class Net(nn.Module):
    def __init__(self, read: Callable[[Any], float], held: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.read, self.held = nn.Linear(4, 4), read, held
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).tanh() * self.read(self)


class Key:
    """What a weak dict may have as a key."""


KEY = Key()
TABLE = {"v": 2.0}


class Kind(type):
    factor = 2.0


class Made(metaclass=Kind):
    pass


class Limit(collections.UserDict[str, float]):
    """A user's own class."""


def weak(value: float) -> Any:
    found: Any = weakref.WeakKeyDictionary()
    found[KEY] = value
    return found


def put(key: Any) -> Callable[[Any, float], None]:
    return lambda held, value: held.__setitem__(key, value)


# name → (what is held, how a number of it is read, how that is changed)
KINDS: dict[str, tuple[Any, Callable[[Any], float], Callable[[Any, float], Any]]] = {
    "mapping proxy": (
        types.MappingProxyType(TABLE),
        lambda n: n.held["v"],
        lambda held, value: TABLE.update(v=value),
    ),
    "ChainMap": (
        collections.ChainMap({}, TABLE),
        lambda n: n.held["v"],
        lambda held, value: TABLE.update(v=value),
    ),
    "UserDict": (collections.UserDict(v=2.0), lambda n: n.held["v"], put("v")),
    "user's UserDict": (Limit(v=2.0), lambda n: n.held["v"], put("v")),
    "UserList": (collections.UserList([2.0]), lambda n: n.held[0], put(0)),
    "Counter": (collections.Counter(v=2), lambda n: n.held["v"], put("v")),
    "defaultdict": (
        collections.defaultdict(float, v=2.0),
        lambda n: n.held["v"],
        put("v"),
    ),
    "weak dict": (weak(2.0), lambda n: n.held[KEY], put(KEY)),
    "array": (array.array("d", [2.0]), lambda n: n.held[0], put(0)),
    "memoryview": (
        memoryview(array.array("d", [2.0])),
        lambda n: n.held[0],
        put(0),
    ),
    "ctypes": (
        ctypes.c_double(2.0),
        lambda n: n.held.value,
        lambda held, value: setattr(held, "value", value),
    ),
    "ctypes array": ((ctypes.c_double * 2)(2.0), lambda n: n.held[0], put(0)),
    "array of objects": (
        np.array([2.0, None], dtype=object),
        lambda n: float(n.held[0]),
        put(0),
    ),
    "large array": (np.full(1 << 17, 2.0), lambda n: float(n.held[5]), put(5)),
    "metaclass": (
        None,
        lambda n: Made.factor,
        lambda held, value: setattr(Kind, "factor", value),
    ),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:the model's forward sets")
def test_a_change_inside_is_noticed(name: str) -> None:
    held, read, change = KINDS[name]
    model, x = Net(read, held), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 1, 3)
    assert_close(pipe(x), model(x))
    first = pipe.captured
    pipe(x)
    assert pipe.captured is first  # comparing costs no capture
    for value in (3.0, 5.0):
        change(held, value)
        assert_close(pipe(x), model(x))
    change(held, 2.0)


WRITTEN: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "bytearray": (bytearray(b"ab"), lambda o: o.extend(b"c")),
    "array": (array.array("d", [1.0]), lambda o: o.__setitem__(0, 2.0)),
    "memoryview": (memoryview(bytearray(b"ab")), lambda o: o.__setitem__(0, 3)),
    "ctypes": (ctypes.c_int(3), lambda o: setattr(o, "value", 4)),
    "numpy": (np.ones((2, 2)), lambda o: o.fill(3)),
    "columns of numpy": (np.ones((4, 4))[:, ::2], lambda o: o.fill(3)),
    "numpy objects": (np.array([[1, None]], dtype=object), lambda o: o.fill("x")),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_contents_are_restored(name: str) -> None:
    owner, change = WRITTEN[name]
    holder = container_of(owner, "x")
    assert holder is not None
    before = holder.read()
    change(owner)
    assert holder.read() != before
    for key, value in before.items():
        holder.write(key, value)
    assert holder.read() == before


def test_the_contents_of_huge_arrays_are_not_compared() -> None:
    owner = np.zeros(LARGEST_ARRAY // 8 + 1)
    holder = container_of(owner, "x")
    assert holder is not None
    before = holder.read()
    owner[0] = 1
    assert holder.read() == before
    holder.write(CONTENT, before[CONTENT])
    assert owner[0] == 1


@pytest.mark.parametrize(
    "held",
    [
        np.ones(LARGEST_ARRAY // 8 + 1),
        bytearray(b"1") * (LARGEST_ARRAY + 1),
        [1.0] * (LARGEST_CONTAINER + 1),
        dict.fromkeys(range(LARGEST_CONTAINER + 1), 1.0),
        set(range(LARGEST_CONTAINER + 1)),
    ],
    ids=["array", "bytearray", "list", "dict", "set"],
)
def test_what_is_too_large_to_be_compared_is_named(held: Any) -> None:
    model, x = Net(lambda net: float(len(net.held)), held), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 1, 3)
    with pytest.warns(UserWarning, match=r"reads held, too large to be compared in every call"):
        assert_close(pipe(x), model(x))


@pytest.mark.parametrize("held", [np.ones(LARGEST_ARRAY // 8), [1.0] * LARGEST_CONTAINER])
def test_smaller_data_is_not(held: Any, recwarn: pytest.WarningsRecorder) -> None:
    model, x = Net(lambda net: float(net.held[0]), held), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 1, 3)
    assert_close(pipe(x), model(x))
    held[0] = 3.0
    assert_close(pipe(x), model(x))
    assert not [w for w in recwarn if "too large" in str(w.message)]


class Remembers(nn.Module):
    """Keeps a table per model in a weak dict, as libraries do."""

    tables: ClassVar[Any] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self not in Remembers.tables:
            Remembers.tables[self] = torch.arange(4.0)
        return self.a(x) + Remembers.tables[self]


@pytest.mark.filterwarnings("ignore:the model's forward sets")
def test_a_weak_cache_keeps_no_tensor_of_the_capture() -> None:
    model, x = Remembers(), torch.randn(6, 4)
    found = autopipe.compile(model, 1, 3)(x)
    assert len(Remembers.tables) == 0
    assert type(model(x)) is Tensor
    assert_close(found, model(x))
