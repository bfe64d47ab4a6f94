"""Objects that hold tensors, as arguments and as results: taken apart, and put together again."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
from collections import UserDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autopipe
from autopipe.errors import InputError
from autopipe.passes.capture import take_apart
from tests.support.agreement import assert_close


@dataclasses.dataclass
class Plain:
    x: Tensor
    scale: float = 2.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: float = 2.0


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Tensor
    scale: float = 2.0


@dataclasses.dataclass
class Later:
    """A field that the constructor does not take."""

    x: Tensor
    scale: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.checked = True


class Named(NamedTuple):
    x: Tensor
    scale: float = 2.0


class Batch:
    """An ordinary object."""

    def __init__(self, x: Tensor, scale: float = 2.0) -> None:
        self.x, self.scale = x, scale


class SlotBatch:
    __slots__ = ("scale", "x")

    def __init__(self, x: Tensor, scale: float = 2.0) -> None:
        self.x, self.scale = x, scale


class Encoding(UserDict):  # type: ignore[type-arg]
    """As transformers' BatchEncoding: a mapping with attributes, some of which change."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        self.encodings = [object()]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Dict(dict):  # type: ignore[type-arg]
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def later(x: Tensor, scale: float = 2.0) -> Later:
    made = Later(x)
    made.scale = scale
    return made


MAKE: dict[str, Any] = {
    "dataclass": Plain,
    "frozen": Frozen,
    "slots": Slotted,
    "field that is set later": later,
    "named tuple": Named,
    "object": Batch,
    "object with slots": SlotBatch,
    "namespace": lambda x, scale=2.0: types.SimpleNamespace(x=x, scale=scale),
    "user dict": lambda x, scale=2.0: Encoding({"x": x, "scale": scale}),
    "dict subclass": lambda x, scale=2.0: Dict(x=x, scale=scale),
    "nested": lambda x, scale=2.0: Plain([Batch(x)], scale),  # type: ignore[arg-type]
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.double()

    def forward(self, batch: Any) -> Any:
        x = batch.x[0].x if isinstance(batch.x, list) else batch.x
        assert type(batch).__name__ == self.expected
        return self.b(self.a(x).tanh()) * batch.scale

    expected = ""


def x() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.parametrize("name", MAKE)
def test_as_an_argument(name: str) -> None:
    make = MAKE[name]
    model = Net()
    model.expected = type(make(x())).__name__
    pipe = autopipe.compile(model, 2, 3)
    batch = make(x())
    before = copy.copy(batch)
    assert_close(pipe(batch), model(batch))
    assert type(batch) is type(before)
    other = make(x())  # other tensors, the same structure
    first = pipe.captured
    assert_close(pipe(other), model(other))
    assert pipe.captured is first
    for number in (3.0, 4.0, 5.0):
        changed = make(x(), number)
        assert_close(pipe(changed), model(changed))
    assert autopipe.explain_captures(pipe).count == 2


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.a, self.make = nn.Linear(4, 4), make
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.make(self.a(x).tanh(), x.sum(1))


@pytest.mark.parametrize("name", [n for n in MAKE if n != "nested"])
def test_as_a_result(name: str) -> None:
    model = Returns(MAKE[name])
    pipe, batch = autopipe.compile(model, 2, 3), x()
    found, expected = pipe(batch), model(batch)
    assert type(found) is type(expected)
    assert_close(found.x, expected.x)
    assert_close(found.scale, expected.scale)
    if hasattr(expected, "__dict__"):
        assert vars(found).keys() == vars(expected).keys()
    found.x.sum().backward()
    assert model.a.weight.grad is not None


def test_a_distribution_is_returned() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)
            self.double()

        def forward(self, x: Tensor) -> Any:
            return torch.distributions.Normal(self.a(x), 1.0, validate_args=False)

    model, batch = Policy(), x()
    found, expected = autopipe.compile(model, 1, 3)(batch), model(batch)
    actions = torch.randn(6, 2, dtype=torch.float64)
    assert_close(found.log_prob(actions), expected.log_prob(actions))


def test_transformers_batches() -> None:
    transformers = pytest.importorskip("transformers")

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(10, 4)
            self.double()

        def forward(self, batch: Any) -> Tensor:
            return self.e(batch["input_ids"]) * batch.attention_mask[..., None]

    def encoded(seed: int) -> Any:
        torch.manual_seed(seed)
        data = {"input_ids": torch.randint(10, (6, 3)), "attention_mask": torch.ones(6, 3).double()}
        return transformers.BatchEncoding(data)

    model = Reads()
    pipe = autopipe.compile(model, 1, 3)
    for seed in range(2):
        batch = encoded(seed)
        assert_close(pipe(batch), model(batch))


def test_nothing_is_registered_for_the_users_classes() -> None:
    autopipe.compile(Net(), 1, 3)
    take_apart((Plain(x()), Batch(x()), Dict(x=x())))
    for kind in (Plain, Batch, Dict, Encoding):
        assert kind not in pytree.SUPPORTED_NODES


def test_structures_are_compared() -> None:
    def spec(value: Any) -> pytree.TreeSpec:
        return pytree.tree_structure(take_apart(value))

    assert spec(Plain(x())) == spec(Plain(x()))
    different = [
        Plain(x()),
        Frozen(x()),
        Batch(x()),
        {"x": x(), "scale": 2.0},
        Dict(x=x(), scale=1),
    ]
    for n, a in enumerate(different):
        for b in different[n + 1 :]:
            assert spec(a) != spec(b)


def test_what_holds_no_tensor_stays_whole() -> None:
    for value in (Batch(1), types.SimpleNamespace(a=1), np.ones(2), "x", None, nn.Linear(1, 1)):  # type: ignore[arg-type]
        assert take_apart(value) is value


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 2000), nn.Linear(2000, 2)

    def forward(self, x: Tensor, w: Any) -> Tensor:
        w = w.value if isinstance(w, Config) else w
        return self.b(self.a(x).tanh() * torch.as_tensor(w, dtype=torch.float32))


class Config:
    """Its `repr` says nothing."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Config()"


class BadRepr(float):
    def __repr__(self) -> str:
        raise ZeroDivisionError


def noise() -> Any:
    values = np.zeros(2000)
    values[500:1500] = np.random.default_rng().random(1000)
    return values


@pytest.mark.parametrize(
    "make", [noise, lambda: Config(float(noise().mean())), lambda: BadRepr(noise().mean())]
)
def test_arguments_that_look_alike_are_told_apart(make: Any) -> None:
    model, x = Scales(), torch.randn(6, 4)
    pipe = autopipe.compile(model, 2, 3)
    one, two = make(), make()
    torch.testing.assert_close(pipe(x, one), model(x, one))
    with pytest.warns(UserWarning, match=r"argument \w+: .* pass .* as a tensor"):
        pipe(x, two)
    torch.testing.assert_close(pipe(x, two), model(x, two))
    torch.testing.assert_close(pipe(x, one), model(x, one))
    torch.testing.assert_close(pipe(x, copy.copy(one)), model(x, one))  # equal values will do


@pytest.mark.parametrize(
    "value", [iter([1.0]), (n for n in (1.0,)), memoryview(b"1"), collections.Counter().elements()]
)
def test_what_cannot_be_compared_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="can be compared from call to call") as caught:
        autopipe.compile(Scales(), 2, 3)(torch.randn(6, 4), value)
    assert type(value).__name__ in str(caught.value.found)


# ------------------------------------------------------------------- attributes of a pipeline


class Warm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.temperature, self._private = nn.Linear(4, 4), 1.0, 1.0
        self.log: list[str] = []

    @property
    def doubled(self) -> float:
        return self.temperature * 2

    @doubled.setter
    def doubled(self, value: float) -> None:
        self.temperature = value / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) / self.temperature * self._private


def test_attributes_set_on_the_pipeline_reach_the_model() -> None:
    model, x = Warm(), torch.randn(6, 4)
    pipe = autopipe.compile(model, 1, 3)
    torch.testing.assert_close(pipe(x), model(x))
    for name, value in (("temperature", 3.0), ("doubled", 10.0), ("_private", 0.5)):
        setattr(pipe, name, value)
        assert getattr(model, name) == value
        torch.testing.assert_close(pipe(x), model(x))
    pipe.a = nn.Linear(4, 4)
    assert model.a is pipe.a
    torch.testing.assert_close(pipe(x), model(x))
    del pipe.log
    assert not hasattr(model, "log")


def test_the_pipelines_own_attributes_stay_its_own() -> None:
    model = Warm()
    pipe = autopipe.compile(model, 1, 3)
    own = pipe.forward
    pipe.forward = lambda x: own(x) * 2  # as Accelerate wraps it
    pipe._original_forward = own
    x = torch.randn(6, 4)
    torch.testing.assert_close(pipe(x), model(x) * 2)
    assert "forward" not in vars(model)
    assert "_original_forward" not in vars(model)
    del pipe.forward
    torch.testing.assert_close(pipe(x), model(x))
    assert copy.deepcopy(pipe).temperature == 1.0
