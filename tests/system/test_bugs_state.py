"""What a capture once did to the objects around a model, and what it once did not notice."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import graph
from torch.utils.checkpoint import checkpoint

import autopipe
from autopipe.errors import CaptureError
from tests.support.agreement import assert_close


class Net(nn.Module):
    """``forward(x)`` passes the hidden layer through ``use(self, hidden)``."""

    def __init__(
        self, use: Callable[[Any, Tensor], Tensor] = lambda net, h: h, held: Any = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.use, self.held = use, held
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(self, self.a(x).tanh()))


def batch() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- the user's own containers

Pair = collections.namedtuple("Pair", "one two")


class Ordered(collections.OrderedDict[str, Any]):
    """A user's own class."""


CONTAINERS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"a": 1.0},
    "list": lambda: [1.0],
    "tuple": lambda: (1.0, [2.0]),
    "named tuple": lambda: Pair([1.0], 2.0),
    "ordered dict": lambda: collections.OrderedDict(a=1.0),
    "user's ordered dict": lambda: Ordered(a=1.0),
    "defaultdict": lambda: collections.defaultdict(float, a=1.0),
    "deque": lambda: collections.deque([1.0], maxlen=2),
    "nested": lambda: {"a": [{"b": (1.0,)}]},
    "with a tensor": lambda: [torch.ones(2)],
}


def fails(net: Any, hidden: Tensor) -> Tensor:
    raise ValueError("as asked")


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("failing", [False, True])
def test_a_capture_leaves_the_users_containers_in_place(name: str, failing: bool) -> None:
    """torch.export put copies in their place: what the user changed afterwards had no effect."""
    held = CONTAINERS[name]()
    model = Net(fails if failing else lambda net, h: h, held)
    model.b.held = held  # shared by two modules
    items = list(held.values()) if isinstance(held, dict) else list(held)
    pipe = autopipe.compile(model, 2, 3)
    if failing:
        with pytest.raises(CaptureError):
            pipe(batch())
    else:
        pipe(batch())
    assert model.held is held
    assert model.b.held is held
    found = held.values() if isinstance(held, dict) else held
    assert all(a is b for a, b in zip(found, items, strict=True))


def test_what_the_user_changes_in_a_container_after_a_capture_counts() -> None:
    settings = {"scale": 1.0}
    model, x = Net(lambda net, h: h * net.held["scale"], settings), batch()
    pipe = autopipe.compile(model, 2, 3)
    assert_close(pipe(x), model(x))
    for scale in (2.0, 3.0):
        settings["scale"] = scale
        assert_close(
            pipe(x),
            torch.nn.functional.linear(model.a(x).tanh() * scale, model.b.weight, model.b.bias),
        )


# ------------------------------------------------------------------------- what costs a capture


def scaled_by(factor: float) -> Callable[..., Tensor]:
    return lambda layer, args, out: out * factor


class Scales:
    """A hook that is an object."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, layer: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * self.factor


def forward_times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


@pytest.mark.parametrize("make", [scaled_by, Scales])
@pytest.mark.parametrize("place", ["register_forward_hook", "forward"])
def test_what_takes_the_place_of_a_freed_object_is_another(make: Any, place: str) -> None:
    """Hooks were compared by their id, which a new object has once the old one is freed."""
    model, x = Net(), batch()
    pipe = autopipe.compile(model, 1, 3)
    for factor in range(6):
        if place == "forward":
            model.a.forward = forward_times(float(factor))  # type: ignore[method-assign]
        else:
            handle = model.a.register_forward_hook(make(float(factor)))
        assert_close(pipe(x), model(x))
        if place == "forward":
            del model.a.forward
        else:
            handle.remove()
            del handle


@pytest.mark.parametrize(
    "values", [(2, 2.0), (1, True), (0.0, -0.0), ((1,), (1.0,)), ({"a": 1}, {"a": True})]
)
def test_equal_numbers_of_another_type_or_sign_differ(values: Any) -> None:
    model, x = Net(lambda net, h: h * sum(map(ord, repr(net.held)))), batch()
    pipe = autopipe.compile(model, 1, 3)
    for value in values:
        model.held = value
        assert_close(pipe(x), model(x))


class Integers(nn.Module):
    """Results have the dtype that the number gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.factor = nn.Embedding(9, 4), 2

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(ids), ids * self.factor


def test_a_number_of_another_type_gives_another_dtype() -> None:
    model, ids = Integers(), torch.arange(6)
    pipe = autopipe.compile(model, 1, 3)
    for factor in (2, 2.0, True):
        model.factor = factor  # type: ignore[assignment]
        assert pipe(ids)[1].dtype == model(ids)[1].dtype


UNREAD: dict[str, Callable[[Any, int], Any]] = {
    "counter": lambda net, n: setattr(net, "global_step", n),
    "counter of a layer": lambda net, n: setattr(net.inner, "calls", n),
    "log": lambda net, n: setattr(net, "log", {"loss": 0.1 * n}),
    "history": lambda net, n: net.history.append(n),
    "tensor": lambda net, n: setattr(net, "last_loss", torch.tensor(float(n))),
    "text": lambda net, n: setattr(net, "stage", f"step {n}"),
}


class Inner(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * 2


@pytest.mark.parametrize("name", UNREAD)
def test_attributes_that_the_forward_does_not_read_cost_no_capture(name: str) -> None:
    """What trainers count and log on a model changed its key in every step."""
    model, x = Net(lambda net, h: net.inner(h) * net.held, 2.0), batch()
    model.inner, model.history = Inner(), [0]
    pipe = autopipe.compile(model, 1, 3)
    pipe(x)
    first = pipe.captured
    for n in range(3):
        UNREAD[name](model, n)
        pipe(x)
        assert pipe.captured is first
    model.held = 3.0  # what it reads still counts
    assert_close(pipe(x), model(x))


def test_each_mode_has_its_own_unread_attributes() -> None:
    def use(net: Any, h: Tensor) -> Tensor:
        return h * net.in_training if net.training else h * net.in_evaluation

    model, x = Net(use), batch()
    model.in_training = model.in_evaluation = 2.0
    pipe = autopipe.compile(model, 1, 3)
    seen = [(pipe.train()(x), pipe.captured)[1], (pipe.eval()(x), pipe.captured)[1]]
    for number, mode in ((5.0, True), (6.0, False), (7.0, True)):
        model.in_training = model.in_evaluation = number
        assert_close(pipe.train(mode)(x), model.train(mode)(x))
        assert pipe.captured not in seen
        seen.append(pipe.captured)


class Plain:
    def __init__(self) -> None:
        self.v0 = self.v1 = 2.0
        self.__dict__["odd name"] = 1.0


class Slotted:
    __slots__ = ("v0", "v1")

    def __init__(self) -> None:
        self.v0 = self.v1 = 2.0


UNNAMED: dict[str, tuple[Callable[[Any], float], Callable[[], Any]]] = {
    "formatted": (lambda o: sum(getattr(o, f"v{i}") for i in range(2)), Plain),
    "concatenated": (lambda o: getattr(o, "v" + str(1)), Plain),
    "formatted, of slots": (lambda o: sum(getattr(o, f"v{i}") for i in range(2)), Slotted),
    "vars": (lambda o: sum(vars(o).values()), Plain),
    "__dict__": (lambda o: o.__dict__["v" + "1"] * sum(o.__dict__.values()), Plain),
    "after a plain one": (lambda o: getattr(o, "v0") + getattr(o, f"v{int(o.v0 > 0)}"), Plain),  # noqa: B009
}


@pytest.mark.parametrize(
    ("name", "of_model"), [*((n, False) for n in UNNAMED), ("formatted", True)]
)
def test_attributes_that_are_read_without_their_names(name: str, of_model: bool) -> None:
    read, make = UNNAMED[name]
    model = Net(lambda net, h: h * read(net if of_model else net.held), make())
    model.v0 = model.v1 = 2.0
    x, pipe = batch(), autopipe.compile(model, 1, 3)
    assert_close(pipe(x), model(x))
    owner = model if of_model else model.held
    for value in (3.0, 4.0):
        owner.v1 = value
        assert_close(pipe(x), model(x))


# ---------------------------------------------------------------------------- modes around a call


def checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(net: Any, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(net, x, use_reentrant=reentrant)
        return found

    return run


def within(make: Callable[[], Any]) -> Callable[[Any, Tensor], Tensor]:
    def run(net: Any, x: Tensor) -> Tensor:
        with make():
            found: Tensor = net(x)
        return found

    return run


AROUND: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "reentrant checkpoint": checkpointed(True),
    "checkpoint": checkpointed(False),
    "save_on_cpu": within(graph.save_on_cpu),
    "hooks": within(lambda: graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)),
    "no hooks": within(lambda: graph.disable_saved_tensors_hooks("disabled")),
    "anomaly detection": within(lambda: torch.autograd.set_detect_anomaly(True)),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_a_first_call_within(name: str) -> None:
    """Hooks on saved tensors kept a capture's tensors alive, which was refused as a leftover."""
    model, eager, x = Net(), Net(), batch()
    pipe = autopipe.compile(model, 2, 3)
    gradients = []
    for net, owner in ((eager, eager), (pipe, model)):
        z = x.clone().requires_grad_()
        AROUND[name](net, z).square().sum().backward()
        gradients.append([z.grad, *(p.grad for p in owner.parameters())])
    for expected, found in zip(*gradients, strict=True):
        assert_close(found, expected)
