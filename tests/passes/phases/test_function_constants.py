"""Constants inside a custom autograd.Function: made anew if they are made there, else refused."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from autopipe.passes.phases.function_constants import LARGEST
from tests.support.agreement import assert_agrees, pipelined
from tests.support.programs import user_line

pytestmark = pytest.mark.few(2)

Op = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


class Model(nn.Module):
    """A Function of these two between two layers."""

    def __init__(self, forward: Op = same, backward: Op = same) -> None:
        super().__init__()

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return forward(x * 1)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return backward(gradient * 1)

        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.function = Function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function.apply(self.first(x)))


def batch(size: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 4, generator=generator, dtype=torch.float64).requires_grad_()


def written(x: Tensor) -> Tensor:
    constant = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    constant[1] = 7
    return x * constant.mul_(3)


OPS: dict[str, Op] = {
    "a number": lambda x: torch.maximum(x, torch.tensor(-0.1, dtype=torch.float64)),
    "a number in single precision": lambda x: x + torch.tensor(0.1),
    "a list": lambda x: x * torch.tensor([1.0, -2.0, 0.3, 4e-9]),
    "several": lambda x: x * torch.tensor(3.0) + torch.tensor([1, 2, 3, 4]) - torch.tensor(3.0),
    "an integer": lambda x: x * torch.tensor(-(2**53) - 1) * 1e-16,
    "indices": lambda x: x[:, torch.tensor([2, 0, 1, 1])],
    "a mask": lambda x: torch.where(torch.tensor([True, False, True, False]), x, 2 * x),
    "two dimensions": lambda x: x @ torch.tensor([[1, 2, 3, 4]] * 4, dtype=x.dtype),
    "like another": lambda x: x * x.new_tensor([1, 2, 3, 4]),
    "as a tensor": lambda x: x * torch.as_tensor((0.5, 1.5, 2.5, 3.5), dtype=torch.float64),
    "of NumPy's numbers": lambda x: x * torch.tensor(numpy.float32(0.1)),
    "infinite": lambda x: torch.minimum(x, torch.tensor([inf, 0.0, inf, 0.0], dtype=x.dtype)),
    "not a number": lambda x: torch.where(torch.isnan(torch.tensor([nan, 1, 2, 3])), x, 3 * x),
    "half a precision": lambda x: x * torch.tensor([0.1] * 4, dtype=torch.bfloat16),
    "none at all": lambda x: torch.cat(
        [x, torch.tensor([], dtype=x.dtype).expand(x.shape[0], 0)], 1
    ),
    "written to": written,
    "in an index": lambda x: x[:, [2, 0, 1, 1]],
    "read": lambda x: x * torch.tensor(0.7).item(),
    "as many as may be": lambda x: x * torch.tensor([0.1] * LARGEST).view(-1, 4).sum(0),
}


@pytest.mark.parametrize("name", OPS)
def test_a_constant_that_a_forward_makes(name: str) -> None:
    assert_agrees(pipelined(Model(forward=OPS[name])), batch())


@pytest.mark.parametrize("name", OPS)
def test_a_constant_that_a_backward_makes(name: str) -> None:
    assert_agrees(pipelined(Model(backward=OPS[name])), batch())


@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
def test_constants_under_each_rematerialization(remat: str) -> None:
    model = Model(forward=lambda x: OPS["several"](OPS["a mask"](x)), backward=OPS["a list"])
    pipe = pipelined(model, remat=remat)
    for size in (7, 2):
        assert_agrees(pipe, batch(size))
    with torch.no_grad():
        torch.testing.assert_close(pipe(batch()), model(batch()), rtol=1e-12, atol=1e-12)


def test_the_program_shows_them() -> None:
    """What is printed is what runs."""
    pipe = pipelined(Model(forward=OPS["a list"], backward=OPS["an integer"]), chunks=2)
    pipe(batch(4)).sum().backward()
    assert "torch.tensor([1.0, -2.0, " in pipe.code
    assert f"torch.tensor({-(2**53) - 1}, dtype = torch.int64, device = device(type='cpu'))" in (
        pipe.code
    )
    assert "get_attr" not in pipe.code
    assert "_tensor_constant" not in pipe.code


def test_setup_context() -> None:
    """The newer way to write a Function."""

    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return torch.maximum(x, torch.tensor(-0.1, dtype=torch.float64))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            (x,) = inputs
            ctx.save_for_backward(x > torch.tensor(0.2))

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.where(ctx.saved_tensors[0], torch.tensor(5.0), 0.5)

    model = Model()
    model.function = Clip  # type: ignore[assignment]
    assert_agrees(pipelined(model), batch())


# ------------------------------------------------------------------------------- closures

PARAMETER = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
GLOBAL = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
ARRAY = GLOBAL.numpy()  # the same memory

REMEDY = "it may create a constant from numbers in its own code: torch.tensor(0.5)"

CLOSURES: dict[str, Op] = {
    "a tensor": lambda x: x * GLOBAL,
    "a parameter": lambda x: x * PARAMETER,
    "a copy": lambda x: x * GLOBAL.clone(),
    "a part": lambda x: x * GLOBAL[0],
    "a constant beside it": lambda x: x * torch.tensor(2.0) * PARAMETER,
    "as a tensor": lambda x: x * torch.as_tensor(GLOBAL),
    "a tensor of a tensor": lambda x: x * torch.tensor(GLOBAL.detach()),
    "a tensor of a parameter's value": lambda x: x * torch.tensor([PARAMETER, 1.0, 1.0, 1.0]),
    "like another": lambda x: x * x.new_tensor([PARAMETER, 1.0, 1.0, 1.0]),
    "an array": lambda x: x * torch.as_tensor(ARRAY),
    "an array's memory": lambda x: x * torch.from_numpy(ARRAY),
    "an array's values": lambda x: x * torch.tensor(ARRAY),
    "a list of values": lambda x: x * GLOBAL.tolist()[1],
    "a tensor of a list of values": lambda x: x * torch.tensor(GLOBAL.tolist()),
}
READ_IN_BACKWARD: dict[str, Op] = {  # in a forward, torch.export refuses these
    "a number": lambda x: x * PARAMETER.item(),
    "a float": lambda x: x * float(PARAMETER),
    "an integer": lambda x: x * int(PARAMETER),
    "a tensor of a number": lambda x: x * torch.tensor(PARAMETER.item()),
    "a tensor of a float": lambda x: x * torch.tensor([float(PARAMETER)] * 4),
    "an array": lambda x: x * torch.tensor(GLOBAL.numpy()),
    "a choice": lambda x: x * (2.0 if bool(PARAMETER) else 1.0),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", CLOSURES)
def test_what_a_forward_has_by_closure_is_refused(name: str) -> None:
    """It would stay what it was, whatever the optimizer does, and have no gradient."""
    with pytest.raises(
        CaptureError, match="uses a tensor that is not one of its arguments"
    ) as caught:
        pipelined(Model(forward=CLOSURES[name]))(batch())
    assert caught.value.source == user_line(Model.forward, "self.function" + ".apply(")
    assert REMEDY in str(caught.value.remedy)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", [*CLOSURES, *(f"read: {name}" for name in READ_IN_BACKWARD)])
def test_what_a_backward_has_by_closure_is_refused(name: str) -> None:
    op = CLOSURES[name] if name in CLOSURES else READ_IN_BACKWARD[name.removeprefix("read: ")]
    with pytest.raises(
        CaptureError, match="uses a tensor that is not one of its arguments"
    ) as caught:
        pipelined(Model(backward=op))(batch())
    assert REMEDY in str(caught.value.remedy)
    assert caught.value.source == user_line(Model.forward, "self.function" + ".apply(")


@pytest.mark.parametrize("name", ["last.bias", "scale"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_the_models_own_tensors_are_refused(way: str, name: str) -> None:
    """A parameter and a buffer that the Function knows through the module."""
    held: dict[str, Tensor] = {}
    model = Model(**{way: lambda x: x * (1 + held[name])})
    model.register_buffer("scale", torch.ones(4, dtype=torch.float64))
    held |= dict(model.named_parameters()) | dict(model.named_buffers())
    with pytest.raises(
        CaptureError, match="uses a tensor that is not one of its arguments"
    ) as caught:
        pipelined(model)(batch())
    assert REMEDY in str(caught.value.remedy)


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize(
    ("op", "found"),
    [
        (lambda x: x * torch.tensor([0.1] * 4 * LARGEST).view(-1, 4).sum(0), "shape (256,)"),
        (lambda x: x * torch.tensor([1j]).abs(), "complex64"),
    ],
    ids=["large", "complex"],
)
def test_what_cannot_be_written_down_is_refused(way: str, op: Op, found: str) -> None:
    with pytest.raises(CaptureError, match=r"cannot be written|too large") as caught:
        autopipe.compile(Model(**{way: op}), 1, 2)(batch())
    assert found in str(caught.value.found)
    assert caught.value.source == user_line(Model.forward, "self.function" + ".apply(")
    assert "torch.full" in str(caught.value.remedy)
