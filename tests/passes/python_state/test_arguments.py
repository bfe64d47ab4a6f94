"""What a forward asks of its arguments besides values and sizes: the same as eager, or refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError, InputError

X, Y = torch.randn(4, 4), torch.randn(4, 4)


class Asks(nn.Module):
    def __init__(self, ask: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.ask = nn.Linear(4, 4), nn.Linear(4, 4), ask

    def forward(self, *tensors: Tensor) -> Tensor:
        scale = 3.0 if self.ask(*tensors) else 1.0
        return self.b(self.a(tensors[0]).tanh()) * scale + sum(tensors[1:])


def compiled(model: nn.Module, *args: Tensor) -> autopipe.Pipeline:
    return autopipe.compile(model, devices=2, chunks=2, args=args)


def loops(x: Tensor, y: Tensor) -> bool:
    return any(x is t for t in [y])


SAME: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "is": lambda x, y: x is y,
    "is not": lambda x, y: x is not y,
    "id": lambda x, y: id(x) == id(y),
    "operator.is_": operator.is_,
    "in a loop": loops,
    "keys of a dict": lambda x, y: len({x: 1, y: 2}) == 1,
    "a set": lambda x, y: len({x, y}) == 1,
    "as a key": lambda x, y: y in {x: 0},
}


@pytest.mark.parametrize("first", [(X, Y), (X, X)], ids=["two", "one"])
@pytest.mark.parametrize("ask", SAME)
def test_whether_two_arguments_are_one(ask: str, first: tuple[Tensor, Tensor]) -> None:
    if ask == "operator.is_":
        model: nn.Module = Asks(lambda x, y: operator.is_(x, y))
    else:
        model = Asks(SAME[ask])
    pipe = compiled(model, *first)
    for call in (first, (X, Y), (X, X), (Y, X), (Y, Y)):
        torch.testing.assert_close(pipe(*call), model(*call))


def test_gradients_of_one_tensor_in_two_places() -> None:
    model = Asks(lambda x, y: x is y)
    pipe = compiled(model, X, X)
    found, wanted = X.clone().requires_grad_(), X.clone().requires_grad_()
    pipe(found, found).sum().backward()
    model(wanted, wanted).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)


def test_a_model_that_does_not_ask_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are often the inputs themselves; `is None` asks for nothing."""
    captures: list[object] = []
    original = autopipe.program_cache.capture_with_costs

    def counted(*args: Any) -> Any:
        captures.append(args)
        return original(*args)

    monkeypatch.setattr("autopipe.program_cache.capture_with_costs", counted)
    model = Asks(lambda x, y: x is None or y is not None)
    pipe = compiled(model, X, X)
    for call in ((X, X), (X, Y), (Y.clone().requires_grad_(), X), (X.t(), Y)):
        torch.testing.assert_close(pipe(*call), model(*call))
    assert len(captures) == 1


def test_one_tensor_that_is_batched_and_shared() -> None:
    """A forward that asks would get another answer: it is refused, but two tensors are not."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            scale = 2.0 if x is table else 1.0
            return self.b(self.a(x).tanh()) @ table * scale

    model = Both()
    pipe = autopipe.compile(model, devices=2, chunks=2, in_dims=(0, None), args=(X, Y))
    with pytest.raises(CaptureError, match="one object"):
        pipe(X, X)
    torch.testing.assert_close(pipe(X, Y), model(X, Y))


FLAGS: dict[str, Callable[[Tensor], Any]] = {
    "of the argument": lambda x: x.requires_grad,
    "of a result": lambda x: (x * 2).requires_grad,
    "is_leaf": lambda x: (x * 2).is_leaf,
    "grad_fn": lambda x: (x * 2).grad_fn is None,
    "is_leaf of the argument": lambda x: x.is_leaf,
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("ask", FLAGS)
def test_whether_a_gradient_is_wanted(ask: str, grad: bool) -> None:
    model = Asks(FLAGS[ask])
    pipe = compiled(model, X)
    with torch.set_grad_enabled(grad):
        for x in (X, X.clone().requires_grad_(), Y):
            torch.testing.assert_close(pipe(x), model(x))


HIDDEN: dict[str, tuple[Callable[[Tensor], Any], Callable[[], Tensor]]] = {
    "attribute": (lambda x: getattr(x, "flag", False), lambda: marked(X.clone())),
    "computed attribute": (lambda x: getattr(x, "fl" + "ag", False), lambda: marked(X.clone())),
    "hasattr": (lambda x: hasattr(x, "flag"), lambda: marked(X.clone())),
    "is_contiguous": (lambda x: not x.is_contiguous(), lambda: X.clone().t()),
    "stride": (lambda x: x.stride(0) == 1, lambda: X.clone().t()),
    "is_leaf": (lambda x: not x.is_leaf, lambda: X.clone().requires_grad_() * 2),
    "grad_fn": (lambda x: x.grad_fn is not None, lambda: X.clone().requires_grad_() * 2),
}


def marked(x: Tensor) -> Tensor:
    x.flag = True  # type: ignore[attr-defined]
    return x


@pytest.mark.parametrize("first", [True, False], ids=["captured with it", "called with it"])
@pytest.mark.parametrize("ask", HIDDEN)
def test_what_a_trace_does_not_show_is_refused(ask: str, first: bool) -> None:
    asks, make = HIDDEN[ask]
    model = Asks(asks)
    if first:
        with pytest.raises(CaptureError, match="asks for more of an argument") as error:
            compiled(model, make())
    else:
        pipe = compiled(model, X)
        with pytest.raises(CaptureError, match="asks for more of an argument") as error:
            pipe(make())
        torch.testing.assert_close(pipe(Y), model(Y))
    assert "what to do" in str(error.value)


def test_what_is_not_asked_for_may_differ() -> None:
    model = Asks(lambda x: x.shape[1] == 4)
    pipe = compiled(model, X)
    for x in (marked(X.clone()), X.clone().t(), X.clone().requires_grad_() * 2):
        torch.testing.assert_close(pipe(x), model(x))


def test_how_often_a_tensor_was_changed_is_refused() -> None:
    with pytest.raises(CaptureError, match="how often a tensor was changed"):
        compiled(Asks(lambda x: x._version > 0), X)


TYPES: dict[str, Callable[[Tensor], Any]] = {
    "is": lambda x: type(x) is torch.Tensor,
    "==": lambda x: type(x) == Tensor,  # noqa: E721
    "in": lambda x: type(x) in (list, Tensor),
    "not": lambda x: type(x) is not nn.Parameter,
    "__class__": lambda x: x.__class__ is Tensor,
}


@pytest.mark.parametrize("ask", TYPES)
def test_exact_types_of_tensors_are_named(ask: str) -> None:
    """A traced tensor is of a class of its own; `isinstance` is answered as in eager."""
    with pytest.warns(UserWarning, match=r"compares a type with torch.Tensor.*test_arguments.py:"):
        compiled(Asks(TYPES[ask]), X)


def test_other_types_may_be_compared(recwarn: pytest.WarningsRecorder) -> None:
    def ask(x: Tensor) -> bool:
        kind = type(ask)
        return kind is type and isinstance(x, Tensor) and type(x.shape) is not tuple

    model = Asks(ask)
    torch.testing.assert_close(compiled(model, X)(X), model(X))
    assert not [w for w in recwarn if "compares a type" in str(w.message)]


class Own(torch.Tensor):
    """A tensor with operators of its own."""


class Doubles(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Own, Doubles])
def test_subclasses_of_tensors_are_refused(kind: type[Tensor]) -> None:
    model = Asks(lambda x: isinstance(x, kind))
    with pytest.raises(InputError, match=r"a subclass of torch\.Tensor"):
        compiled(model, X.as_subclass(kind))
    pipe = compiled(model, X)
    with pytest.raises(InputError, match=kind.__name__):
        pipe(X.as_subclass(kind))
    parameter = nn.Parameter(X.clone())
    torch.testing.assert_close(pipe(parameter), model(parameter))
