"""Numbers: read from tensors, computed from the batch size, returned, in autocast epilogues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError, CouplingError
from tests.support.agreement import assert_agrees, pipelined

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("traces_once")]


class Model(nn.Module):
    """``forward(x, y)`` is ``f(layer(x), y)``."""

    def __init__(self, f: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.f = nn.Linear(6, 6), f
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.f(self.layer(x), y)


def inputs(size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


READ: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "over a count": lambda h, y: h.square().sum() / (y > 0).sum().item(),
    "over at least one": lambda h, y: h.square().sum() / max(1, (y > 5).sum().item()),
    "over a little more": lambda h, y: h.sum() / ((y > 0).sum().item() + 1e-6),
    "over a part of the batch": lambda h, y: h.sum() / (y.sum().item() / y.shape[0]),
    "a difference": lambda h, y: h.square().sum() * (10 - (y > 0).sum().item()),
    "one over it": lambda h, y: h.square().sum() * (1 / (1 + y.sum().item())),
    "a mean": lambda h, y: h.square().mean() * h.mean().item(),
    "negative": lambda h, y: h.square().mean() * -y.double().mean().item(),
}
SIZES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "one over": lambda h, y: h.square().sum() * (1 / h.shape[0]),
    "over": lambda h, y: h.square().sum() / h.shape[0],
    "over all": lambda h, y: h.square().sum() / h.numel(),
    "over the square": lambda h, y: h.square().sum() / h.shape[0] ** 2,
    "over half": lambda h, y: h.square().sum() / ((h.shape[0] + 1) // 2),
}


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("f", [*READ.values(), *SIZES.values()], ids=[*READ, *SIZES])
def test_numbers_in_a_loss(f: Callable[..., Any], chunks: int) -> None:
    pipe = pipelined(Model(f), chunks=chunks)
    for size in (7, 5, 2):
        assert_agrees(pipe, *inputs(size))


DTYPES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a loss": lambda h, y: h.square().mean() * h.detach().mean().item(),
    "a loss over a count": lambda h, y: h.square().sum() / (y > 0).sum().item(),
    "samples": lambda h, y: h * (y > 0).sum().item(),
    "integers": lambda h, y: y * h.detach().double().square().sum().item(),
    "integers by integers": lambda h, y: y * y.sum().item(),
    "whether": lambda h, y: h > h.detach().mean().item(),
    "a power": lambda h, y: h.mean() * (y.sum().item() ** 2 + 2.0 ** y.double().mean().item()),
    "a half": lambda h, y: h.square().mean() * (y.sum().item() * 0.3),
    "chosen": lambda h, y: torch.where(h > 0, h, h.detach().mean().item()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", DTYPES.values(), ids=DTYPES)
def test_a_number_widens_no_dtype(f: Callable[..., Any], dtype: torch.dtype) -> None:
    x, y = inputs()
    model = Model(f).to(dtype)
    pipe = pipelined(model, chunks=1)
    found, wanted = pipe(x.to(dtype), y), model(x.to(dtype), y)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "f",
    [
        lambda h, y: h.sum() / y.nonzero().shape[0],
        lambda h, y: h.mean() * torch.unique(y).numel(),
        lambda h, y: torch.cat(h.split(torch.bincount(y, minlength=3).tolist())),
        lambda h, y: torch.zeros(y.sum().item()).sum() + h.sum(),
    ],
    ids=["nonzero", "unique", "split", "size"],
)
@pytest.mark.parametrize("chunks", [1, 3])
def test_what_must_be_a_number_is_refused_by_line(f: Callable[..., Any], chunks: int) -> None:
    with pytest.raises(CaptureError, match="depends on the values of tensors") as caught:
        pipelined(Model(f), chunks=chunks)(*inputs())
    assert str(caught.value.source).startswith(__file__)


def test_a_number_of_the_whole_batch_that_every_sample_uses_is_refused() -> None:
    with pytest.raises(CouplingError):
        pipelined(Model(lambda h, y: h * y.max().item()))(*inputs())


def test_results_that_are_made_of_the_batchs_size() -> None:
    def f(h: Tensor, y: Tensor) -> Any:
        n = h.shape[0]
        return {"loss": h.mean(), "n": n, "all": h.numel(), "shape": tuple(h.shape), "k": n / 2}

    pipe = pipelined(Model(f))
    for size in (7, 4, 1):
        found = assert_agrees(pipe, *inputs(size))
        assert found["n"] == size
        assert isinstance(found["n"], int)
        assert isinstance(found["k"], float)


def test_a_result_that_is_read_off_a_tensor_is_refused() -> None:
    with pytest.raises(CaptureError, match="returns a number that depends on") as caught:
        pipelined(Model(lambda h, y: (h.mean(), h.mean().item())))(*inputs())
    assert "return the tensor" in str(caught.value)


def test_a_layer_without_a_shape_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh())
    pipe = autopipe.compile(model, 1, 3)
    with pytest.raises(CaptureError, match="no shape yet") as caught:
        pipe(torch.randn(7, 3))
    assert "call the model itself once" in str(caught.value)
    model(torch.randn(7, 3))
    assert pipe(torch.randn(7, 3)).shape == (7, 4)


def test_an_autocast_region_in_what_is_done_at_the_end() -> None:
    """Of two roundings to bfloat16, one is done on the whole batch: as eager, not as float32."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            total = self.layer(x).sum(0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return (total @ self.layer.weight).float()

    torch.manual_seed(0)
    model, x = Cast(), torch.randn(7, 6)
    found = pipelined(model, args=(x,))(x)
    assert torch.allclose(found, model(x), rtol=1e-2, atol=1e-2)
    assert torch.equal(found, found.bfloat16().float()), "it was computed in bfloat16"
