"""What a forward reads and changes besides tensors: found, restored, and compared later.

Covers python_state/holders.py, python_state/reachable.py, python_state/changes.py and
python_state/reads.py.
"""

from __future__ import annotations

import argparse
import collections
import contextvars
import copy
import enum
import fractions
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from autopipe.passes.python_state.holders import LARGEST_CONTAINER
from autopipe.passes.python_state.state import PythonState
from tests.support.agreement import assert_close

SCALE = 2.0
TABLE = {"scale": 2.0}
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=2.0)


class Context:
    """An object without a base class of torch."""

    kind = 2.0

    def __init__(self) -> None:
        self.value = 2.0
        self.inner = types.SimpleNamespace(value=2.0)
        self.unused = 0

    def read(self) -> float:
        return self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 2.0


class Mode(enum.Enum):
    A = 2.0
    B = 3.0


class Registry(collections.OrderedDict[str, Any]):
    """As transformers' ACT2FN: an entry is created whenever it is read."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class Net(nn.Module):
    """``forward(x)`` multiplies by ``read(self)``."""

    kind = 2.0

    def __init__(self, read: Callable[[Any], Any], held: Any = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.read, self.held = read, held
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()) * self.read(self)


def made(value: float) -> tuple[Callable[[Any], float], Callable[[], None]]:
    """A function that reads a variable around it, and one that changes the variable."""

    def read(net: Any) -> float:
        return value

    def change() -> None:
        nonlocal value
        value = 3.0

    return read, change


def set_global(name: str, value: Any) -> Callable[[Any], None]:
    return lambda net: globals().__setitem__(name, value)


around, change_around = made(2.0)


def defaulted(net: Any, table: dict[str, float] = {"scale": 2.0}) -> float:  # noqa: B006
    return table["scale"]


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


settings = {"scale": 2.0}


@decorated
def through_a_decorator(net: Any) -> float:
    return settings["scale"]


def put(key: str, value: Any) -> Callable[[Any], None]:
    return lambda net: net.held.__setitem__(key, value)


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda net: setattr(net.held, name, value)


# name → (what the forward reads, what it holds, how that is changed)
CHANGES: dict[str, tuple[Callable[[Any], Any], Any, Callable[[Any], Any]]] = {
    "object": (lambda n: n.held.value, Context(), attribute("value", 3.0)),
    "method of an object": (lambda n: n.held.read(), Context(), attribute("value", 3.0)),
    "object in an object": (
        lambda n: n.held.inner.value,
        Context(),
        lambda n: setattr(n.held.inner, "value", 3.0),
    ),
    "class attribute of an object": (
        lambda n: n.held.kind,
        Context(),
        lambda n: setattr(Context, "kind", 3.0),
    ),
    "class attribute": (lambda n: n.kind, None, lambda n: setattr(Net, "kind", 3.0)),
    "slots": (lambda n: n.held.value, Slotted(), attribute("value", 3.0)),
    "namespace": (lambda n: n.held.value, argparse.Namespace(value=2.0), attribute("value", 3.0)),
    "object in a list": (
        lambda n: n.held[0].value,
        [Context()],
        lambda n: setattr(n.held[0], "value", 3.0),
    ),
    "object by a weak reference": (
        lambda n: n.held[0]().value,
        (lambda c: [weakref.ref(c), c])(Context()),
        lambda n: setattr(n.held[1], "value", 3.0),
    ),
    "list": (lambda n: n.held[1], [1.0, 2.0], put(1, 3.0)),  # type: ignore[arg-type]
    "list that grows": (lambda n: float(len(n.held)), [1.0, 2.0], lambda n: n.held.append(1)),
    "dict": (lambda n: n.held["s"], {"s": 2.0}, put("s", 3.0)),
    "deque": (lambda n: n.held[0], collections.deque([2.0]), lambda n: n.held.appendleft(3.0)),
    "set": (lambda n: float(len(n.held)), {1, 2}, lambda n: n.held.add(3)),
    "array": (lambda n: float(n.held[1]), np.ones(3) * 2, lambda n: n.held.fill(3.0)),
    "bytearray": (lambda n: float(n.held[0]), bytearray(b"\2"), put(0, 3)),  # type: ignore[arg-type]
    "numpy number": (float, None, lambda n: None),
    "enum": (lambda n: n.held.value, Mode.A, lambda n: setattr(n, "held", Mode.B)),
    "complex": (lambda n: n.held.real, 2.0 + 1j, lambda n: setattr(n, "held", 3.0 + 1j)),
    "fraction": (
        lambda n: float(n.held),
        fractions.Fraction(2),
        lambda n: setattr(n, "held", fractions.Fraction(3)),
    ),
    "function": (lambda n: n.held(), lambda: 2.0, lambda n: setattr(n, "held", lambda: 3.0)),
    "partial": (
        lambda n: n.held(),
        functools.partial(float, 2.0),
        lambda n: setattr(n, "held", functools.partial(float, 3.0)),
    ),
    "bound method": (
        lambda n: n.held(),
        Context().read,
        lambda n: setattr(n.held.__self__, "value", 3.0),
    ),
    "global": (lambda n: SCALE, None, set_global("SCALE", 3.0)),
    "global dict": (lambda n: TABLE["scale"], None, lambda n: TABLE.update(scale=3.0)),
    "context variable": (lambda n: VARIABLE.get(), None, lambda n: VARIABLE.set(3.0)),
    "variable around": (around, None, lambda n: change_around()),
    "default argument": (defaulted, None, lambda n: defaulted.__defaults__[0].update(scale=3.0)),  # type: ignore[index]
    "through a decorator": (through_a_decorator, None, lambda n: settings.update(scale=3.0)),
    "attribute named by a string": (
        lambda n: getattr(n.held, "value"),  # noqa: B009
        Context(),
        attribute("value", 3.0),
    ),
}
del CHANGES["numpy number"]


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_forward_read_is_noticed_when_it_changes(name: str) -> None:
    global SCALE
    read, held, change = CHANGES[name]
    held = held if "weak" in name or "bound" in name else copy.deepcopy(held)
    kept = Context.kind, Net.kind, SCALE, dict(TABLE), dict(settings)
    torch.manual_seed(0)
    model, x = Net(read, held), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 1, 3)
    try:
        assert_close(pipe(x), model(x))
        before = model(x)
        change(model)
        assert not torch.equal(model(x), before)  # the change matters
        assert_close(pipe(x), model(x))
    finally:
        Context.kind, Net.kind, SCALE = kept[:3]
        TABLE.update(kept[3])
        settings.update(kept[4])


def test_a_change_and_back_is_captured_twice_only() -> None:
    held = Context()
    model, x = Net(lambda n: n.held.value, held), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 1, 3)
    seen = []
    for value in (2.0, 3.0, 2.0, 3.0):
        held.value = value
        assert_close(pipe(x), model(x))
        seen.append(pipe.captured)
    assert seen[0] is seen[2]
    assert seen[1] is seen[3]
    assert seen[0] is not seen[1]


def remembers_in_an_object(net: Any) -> float:
    if not hasattr(net.held, "known"):
        net.held.known = 2.0
    return float(net.held.known)


UNREAD: dict[str, tuple[Callable[[Any], Any], Any, Callable[[Any], Any]]] = {
    "attribute of an object": (lambda n: n.held.value, Context(), attribute("unused", 1)),
    "equal list": (lambda n: n.held[1], [1.0, 2.0], lambda n: setattr(n, "held", [1.0, 2.0])),
    "equal function": (
        lambda n: n.held(),
        (lambda: lambda: 2.0)(),
        lambda n: None,
    ),
    "the model itself, called elsewhere": (
        remembers_in_an_object,
        Context(),
        lambda n: n(torch.randn(6, 4, dtype=torch.float64)),
    ),
}


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.filterwarnings("ignore:the model's forward sets")
def test_what_makes_no_difference_costs_no_capture(name: str) -> None:
    read, held, change = UNREAD[name]
    model, x = Net(read, copy.deepcopy(held)), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 1, 3)
    pipe(x)
    first = pipe.captured
    change(model)
    pipe(x)
    assert pipe.captured is first


# ---------------------------------------------------------------------- what a forward leaves


@functools.cache
def positions(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64) / n


CACHE: dict[int, Tensor] = {}
LAST: list[Tensor] = []
KEPT: Tensor | None = None


class Cached:
    tables: ClassVar[dict[int, Tensor]] = {}

    def __init__(self) -> None:
        self.own: dict[int, Tensor] = {}

    def get(self, n: int) -> Tensor:
        if n not in self.own:
            self.own[n] = torch.arange(n, dtype=torch.float64) / n
        return self.own[n]

    @functools.cached_property
    def four(self) -> Tensor:
        return torch.arange(4, dtype=torch.float64) / 4


def in_a_global_dict(net: Any) -> Tensor:
    if 4 not in CACHE:
        CACHE[4] = torch.arange(4, dtype=torch.float64) / 4
    return CACHE[4]


def in_a_global(net: Any) -> Tensor:
    global KEPT
    KEPT = torch.arange(4, dtype=torch.float64) / 4
    return KEPT


def in_a_class(net: Any) -> Tensor:
    if 4 not in Cached.tables:
        Cached.tables[4] = torch.arange(4, dtype=torch.float64) / 4
    return Cached.tables[4]


def in_the_class_itself(net: Any) -> Tensor:
    if not hasattr(Cached, "table"):
        Cached.table = torch.arange(4, dtype=torch.float64) / 4  # type: ignore[attr-defined]
    return Cached.table  # type: ignore[attr-defined, no-any-return]


def memoized(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    found: dict[Any, Tensor] = {}

    def call(*args: Any) -> Tensor:
        if args not in found:
            found[args] = function(*args)
        return found[args]

    return call


own_memo = memoized(lambda n: torch.arange(n, dtype=torch.float64) / n)


def in_a_default(net: Any, found: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    if 4 not in found:
        found[4] = torch.arange(4, dtype=torch.float64) / 4
    return found[4]


def in_a_function_attribute(net: Any) -> Tensor:
    if not hasattr(in_a_function_attribute, "table"):
        in_a_function_attribute.table = torch.arange(4.0).double() / 4  # type: ignore[attr-defined]
    return in_a_function_attribute.table  # type: ignore[attr-defined, no-any-return]


LEAVES: dict[str, tuple[Callable[[Any], Tensor], Any]] = {
    "lru_cache": (lambda n: positions(4), None),
    "global dict": (in_a_global_dict, None),
    "global": (in_a_global, None),
    "dict of a class": (in_a_class, None),
    "class": (in_the_class_itself, None),
    "own decorator": (lambda n: own_memo(4), None),
    "default argument": (in_a_default, None),
    "function attribute": (in_a_function_attribute, None),
    "object": (lambda n: n.held.get(4), Cached()),
    "cached_property": (lambda n: n.held.four, Cached()),
}


def poisoned() -> list[str]:
    """Where a tensor of a capture was left."""
    places: dict[str, Any] = {
        "CACHE": list(CACHE.values()),
        "LAST": LAST,
        "KEPT": [KEPT],
        "tables": list(Cached.tables.values()),
        "table": [vars(Cached).get("table")],
        "default": list(in_a_default.__defaults__[0].values()),  # type: ignore[index]
        "function": list(vars(in_a_function_attribute).values()),
        "positions": [positions(4)],
        "own_memo": [own_memo(4)],
    }
    return [
        n for n, found in places.items() if any(type(t) not in (Tensor, type(None)) for t in found)
    ]


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.filterwarnings("ignore:the model's forward sets")
def test_no_cache_keeps_a_tensor_of_the_capture(name: str) -> None:
    read, held = LEAVES[name]
    torch.manual_seed(0)
    model, x = Net(read, copy.deepcopy(held)), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 1, 3)
    found = pipe(x)
    assert poisoned() == []
    out = model(x)  # the plain model works
    assert type(out) is Tensor
    assert_close(found, out)
    pipe.eval()
    assert_close(pipe(x), model(x))  # and so does the next capture
    assert poisoned() == []


def fails_after(read: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def fail(net: Any) -> Tensor:
        return read(net) * float(read(net).sum() > 3 and torch.rand(()) > 2)

    return fail


@pytest.mark.parametrize("name", ["lru_cache", "global dict", "dict of a class", "object"])
def test_a_capture_that_fails_leaves_nothing_either(name: str) -> None:
    read, held = LEAVES[name]
    positions.cache_clear()
    CACHE.clear()
    Cached.tables.clear()
    model, x = Net(fails_after(read), copy.deepcopy(held)), torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(CaptureError):
        autopipe.compile(model, 1, 3)(x)
    assert poisoned() == []
    assert type(model(x)) is Tensor


def counts_in_a_global(net: Any) -> float:
    TABLE["calls"] = TABLE.get("calls", 0.0) + 1
    return TABLE["calls"]


def counts_in_an_object(net: Any) -> float:
    net.held.value += 1
    return float(net.held.value)


def counts_in_a_class(net: Any) -> float:
    Context.kind += 1
    return Context.kind


def counter() -> Callable[[Any], float]:
    n = 0.0

    def count(net: Any) -> float:
        nonlocal n
        n += 1
        return n

    return count


@pytest.mark.parametrize(
    ("count", "name"),
    [
        (counts_in_a_global, "TABLE"),
        (counts_in_an_object, "held.value"),
        (counts_in_a_class, "Context.kind"),
        (counter(), "n (a variable around"),
    ],
)
def test_a_counter_that_the_next_call_reads_is_refused(count: Any, name: str) -> None:
    model, x = Net(count, Context()), torch.randn(6, 4, dtype=torch.float64)
    kept = Context.kind, dict(TABLE)
    try:
        with pytest.raises(CaptureError, match="its next call would compute") as caught:
            autopipe.compile(model, 1, 3)(x)
        assert name in str(caught.value.found)
        assert (Context.kind, TABLE, model.held.value) == (*kept, 2.0)
    finally:
        Context.kind = kept[0]
        TABLE.clear()
        TABLE.update(kept[1])


# -------------------------------------------------------------------------------- the parts


def test_changes_are_named_and_set_back_and_forth() -> None:
    inner: Any = nn.Linear(2, 2)
    inner.steps, inner.seen = 0, [1]
    inner.register_buffer("total", torch.zeros(2))
    old = inner.total
    state = PythonState(nn.Sequential(inner))
    assert state.changes() == []
    inner.steps = 1
    inner.seen.append(2)
    inner.new = "here"
    inner.total = inner.total + 1
    inner.register_forward_hook(lambda *args: None)
    changed = state.changes()
    kinds = {str(c): c.holder.kind for c in changed}
    hook = next(n for n, kind in kinds.items() if kind == "hook")
    assert kinds == {
        "0.steps": "attribute",
        "0.seen": "attribute",
        "0.new": "attribute",
        "0.total": "buffer",
        hook: "hook",
    }
    for change in reversed(changed):
        change.set("before")
    assert (inner.steps, inner.seen, hasattr(inner, "new")) == (0, [1], False)
    assert inner.total is old
    assert not inner._forward_hooks
    assert state.changes() == []
    for change in changed:
        change.set("after")
    assert (inner.steps, inner.seen, inner.new) == (1, [1, 2], "here")
    assert len(inner._forward_hooks) == 1
    assert torch.equal(inner.total, torch.ones(2))


def test_a_registry_that_creates_its_entries_stays_as_it_is() -> None:
    registry = Registry(tanh=nn.Tanh)

    class Acts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.registry = nn.Linear(4, 4), registry

        def forward(self, x: Tensor) -> Tensor:
            return torch.Tensor(self.registry["tanh"](self.a(x)))

    model, x = Acts(), torch.randn(6, 4)
    pipe = autopipe.compile(model, 1, 3)
    torch.testing.assert_close(pipe(x), model(x))
    assert collections.OrderedDict.__getitem__(registry, "tanh") is nn.Tanh
    first = pipe.captured
    pipe(x)
    assert pipe.captured is first


def test_large_containers_are_compared_by_their_length() -> None:
    held = {n: float(n) for n in range(LARGEST_CONTAINER + 1)}
    model, x = Net(lambda n: n.held[2], held), torch.randn(6, 4, dtype=torch.float64)
    pipe = autopipe.compile(model, 1, 3)
    pipe(x)
    first = pipe.captured
    assert len(held) == LARGEST_CONTAINER + 1
    held[-1] = 1.0
    pipe(x)
    assert pipe.captured is not first


class Records(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x).tanh()
        y: Tensor = self.b(self.a(x).tanh())
        self.scale = 2.0
        return y


@pytest.mark.filterwarnings("ignore:the model's forward sets")
def test_what_a_forward_only_records_costs_no_capture() -> None:
    """The model itself may run between the pipeline's calls: in an evaluation, for a metric."""
    model, x = Records(), torch.randn(6, 4)
    pipe = autopipe.compile(model, devices=2, chunks=3, args=(x,))
    first = pipe.captured
    for _ in range(3):
        assert_close(model(x), pipe(x))
    assert pipe.captured is first
