"""Fakes against kernels: what a trace believes of strides is what a kernel gives.

Every call that a case makes, forward and backward, runs for real and as a fake with arguments laid
out in the same way. Layouts include those of a batch of one sample that a view made: its stride in
the batch dimension is any number, and decides what memory format a kernel takes the tensor for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopipe.passes.graph.fake_strides import static_fake_mode

pytestmark = pytest.mark.few(6)

CHANNELS = 4


class Compared(TorchDispatchMode):
    """Runs each call twice and notes where the strides of a result differ."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[str] = set()
        self.wrong: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with static_fake_mode() as fakes:
            pass
        twins = pytree.tree_map_only(Tensor, fakes.from_tensor, (args, kwargs or {}))
        given = [(tuple(x.shape), x.stride()) for x in args if isinstance(x, Tensor)]
        with fakes:
            fake = func(*twins[0], **twins[1])
        real = func(*args, **kwargs or {})
        self.calls.add(str(func))
        for a, b in zip(pytree.tree_leaves(real), pytree.tree_leaves(fake), strict=True):
            if isinstance(a, Tensor) and a.numel() and a.stride() != b.stride():
                self.wrong.append(f"{func} of {given}: {a.stride()}, not {b.stride()}")
        return real


def layouts(batch: int, *sizes: int) -> Iterator[Tensor]:
    """One shape, dense in both orders of dimensions; with one sample also other batch strides."""
    shape = (batch, CHANNELS, *sizes)
    last = torch.randn(batch, *sizes, CHANNELS).movedim(-1, 1)
    for tensor in (torch.randn(shape), last):
        yield tensor
        if batch == 1:
            for stride in (1, CHANNELS, 7):
                yield tensor.as_strided(shape, (stride, *tensor.stride()[1:]))


NORMS = {4: nn.BatchNorm2d(CHANNELS), 5: nn.BatchNorm3d(CHANNELS)}
CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "views": lambda x: x.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, CHANNELS, 1) * x.sum(),
    "views back": lambda x: x.flatten(2).view(x.shape) + x.transpose(1, 2).reshape(x.shape),
    "numbers": lambda x: (x * 2.0 + 1.0).div(3.0).sub(x) - (1.0 - x) / 2,
    "comparisons": lambda x: x * (x > 0.5) * (x <= 2.0) * (x != 0),
    "powers": lambda x: x**2 + x.abs() ** 1.5 + x**3.0,
    "masks": lambda x: x.masked_fill(x > 0, -1.0) + torch.where(x > 0, x, 0.0),
    "made like it": lambda x: x + torch.ones_like(x) + torch.zeros_like(x) + torch.full_like(x, 2),
    "drawn like it": lambda x: x * torch.rand_like(x) + torch.randn_like(x),
    "activations": lambda x: F.silu(x) + F.gelu(x) + F.relu(x) + F.leaky_relu(x) + x.sigmoid(),
    "more activations": lambda x: F.elu(x) + F.softplus(x) + F.mish(x) + x.tanh() + x.clamp(min=0),
    "arithmetic": lambda x: x * x + x.exp() - torch.maximum(x, -x) / (x * x + 1).rsqrt(),
    "group norm": nn.GroupNorm(2, CHANNELS),
    "batch norm": lambda x: NORMS[x.ndim].train()(x),
    "batch norm in evaluation": lambda x: NORMS[x.ndim].eval()(x),
    "layer norm": lambda x: F.layer_norm(x, x.shape[2:]),
    "layer norm of channels": lambda x: F.layer_norm(x.movedim(1, -1), (CHANNELS,)),
    "upsampling": lambda x: F.interpolate(x, scale_factor=2.0),
    "softmax": lambda x: x.softmax(1) + F.log_softmax(x, 1),
    "concatenation": lambda x: torch.cat([x, x * x, torch.ones(x.shape)], 1),
    "dropout": lambda x: F.dropout(x, 0.5),
    "after a view": lambda x: F.interpolate(
        x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(x.shape), scale_factor=2.0
    ),
}

if torch.__version__ < "2.12":  # leaky_relu changes the stride of a dimension of one entry there
    CASES["activations"] = lambda x: F.silu(x) + F.gelu(x) + F.relu(x) + x.sigmoid()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [(4, 6), (1, 4), (3, 4, 2)])
@pytest.mark.parametrize("batch", [1, 2])
def test_strides_are_those_of_kernels(name: str, batch: int, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    compared = Compared()
    for x in layouts(batch, *sizes):
        x = x.detach().requires_grad_()
        with compared:
            CASES[name](x).square().sum().backward()
    assert len(compared.calls) > 4, "calls were seen"
    assert compared.wrong == []


def test_a_fake_that_is_wrong_is_seen() -> None:
    """The check above fails for an operator of which torch says other strides than it gives."""
    x = torch.randn(1, 4, 4, CHANNELS).movedim(-1, 1)
    with Compared() as compared:
        x.roll(1, 2)
    assert len(compared.wrong) == 1


def test_what_is_corrected_stays_a_view() -> None:
    with static_fake_mode():
        x = torch.empty(1, 16, 64).transpose(1, 2).contiguous().transpose(1, 2)
        y = x.view(1, 16, 8, 8)
        assert y.stride() == (16, 1, 128, 16)
        assert y.untyped_storage()._cdata == x.untyped_storage()._cdata
