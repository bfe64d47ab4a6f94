"""Odd tensors between stages: complex, strided, aliased, under several names.

Truth is eager torch on the whole batch, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.agreement import assert_agrees, pipelined
from tests.support.breakers import BATCH, WIDTH, Body, Net, crossing, piped, random, sample

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("alike_models_once")]


def carried(make: Callable[[Tensor], Tensor], use: Callable[[Tensor, Tensor], Tensor]) -> Body:
    """`make` something of the first layer's value; `use` it behind the last layer."""

    def body(net: Net, x: Tensor) -> Tensor:
        odd = make(net.layers[0](x))
        return use(odd, net.deep(x, 1))

    return body


def back(odd: Tensor, x: Tensor) -> Tensor:
    return torch.fft.irfft(odd * odd, n=WIDTH) + x


ODD: dict[str, tuple[Body, Callable[[Tensor], bool]]] = {
    "transposed": (
        carried(lambda h: h.view(-1, 2, 3).mT, lambda odd, x: odd.mT.flatten(1) * x),
        lambda t: not t.is_contiguous(),
    ),
    "every other entry": (
        carried(lambda h: h[:, ::2], lambda odd, x: odd * x[:, 1::2]),
        lambda t: not t.is_contiguous(),
    ),
    "expanded": (
        carried(lambda h: h.sum(1, keepdim=True).expand(-1, WIDTH), lambda odd, x: odd * x),
        lambda t: 0 in t.stride(),
    ),
    "overlapping windows": (
        carried(lambda h: h.unfold(1, 3, 1), lambda odd, x: odd.sum(2) * x[:, :4]),
        lambda t: t.dim() == 3 and t.stride(1) == t.stride(2),
    ),
    "complex": (
        carried(torch.fft.rfft, back),
        lambda t: t.is_complex(),
    ),
    "complex conjugate": (
        carried(lambda h: torch.fft.rfft(h).conj(), back),
        lambda t: t.is_complex(),
    ),
    "an imaginary part": (
        carried(lambda h: torch.fft.rfft(h).conj().imag, lambda odd, x: odd * x[:, :4]),
        lambda t: not t.is_complex() and t.shape[1] == 4,
    ),
    "without elements": (
        carried(lambda h: h[:, :0].exp(), lambda odd, x: torch.cat([odd, x], 1)),
        lambda t: t.shape[1] == 0,
    ),
    "of truth values": (
        carried(lambda h: (h > 0).mT.contiguous().mT, lambda odd, x: torch.where(odd, x, -x)),
        lambda t: t.dtype is torch.bool,
    ),
}


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_between_stages(name: str, remat: str) -> None:
    body, is_odd = ODD[name]
    pipe = piped(body, sample(), remat=remat, starts=("linear_2", "tanh_2"))
    odd = [b for b, value in crossing(pipe) if is_odd(value)]
    assert 2 in {k for b in odd for k in b.targets}, "it crosses, to the last stage"


def test_a_complex_input() -> None:
    x = torch.view_as_complex(random(BATCH, 3, 2)).requires_grad_()
    piped(lambda net, z: net.deep(torch.view_as_real(z).flatten(1)), x)


# ------------------------------------------------------------------------------- aliases


def aliased(body: Body, *, frozen: bool = False) -> Net:
    """The first weight is the third layer's as well and has a third name; a bias has two."""
    net = Net(body)
    net.layers[2].weight = net.layers[0].weight
    net.layers[1].bias = net.layers[0].bias
    net.alias = net.layers[0].weight
    net.alias.requires_grad_(not frozen)
    return net


ALIASES: dict[str, Body] = {
    "by its layers": lambda net, x: net.deep(x),
    "twice in one expression": lambda net, x: net.deep(x @ net.alias + net.layers[0](x)),
    "views of it": lambda net, x: net.deep(x * net.alias[0]) + net.layers[2].weight.t()[2],
    "it is a result too": lambda net, x: (net.deep(x), net.alias * 2, net.layers[2].weight),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("name", ALIASES)
def test_names_of_one_parameter(name: str, devices: int, frozen: bool) -> None:
    pipe = pipelined(aliased(ALIASES[name], frozen=frozen), devices=devices)
    assert_agrees(pipe, sample())
    shared = {b.name for s in pipe.stages for b in s.inputs if b.kind == "parameter"}
    assert bool(shared) == (devices > 1), "in one stage, or borrowed by others"
    names = [n for s in pipe.stages for n in s.parameters]
    assert len(set(names)) == len(names)
    used = [id(pipe.model.get_parameter(n)) for n in names]
    assert len(set(used)) == len(used), "one stage holds it, under one name"
