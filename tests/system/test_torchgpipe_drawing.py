"""What torchgpipe 0.0.7 promises its users of random numbers.

A forward and its repetition draw the same; a step moves torch's generator alike on any plan.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.agreement import assert_close, pipelined
from tests.support.nets import REMATS, net, random


class Drops(nn.Module):
    """A product of dropouts and numbers: the gradient of x = 1 is what became of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.rand(64) + 0.5 for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = F.dropout(x, 0.3, self.training) * scale
        return x


def drops() -> Drops:
    torch.manual_seed(0)
    return Drops().double()


@pytest.mark.parametrize(("devices", "remat"), [(1, "full"), (2, "none"), (4, "min-cut")])
def test_what_is_dropped_forward_is_dropped_backward(devices: int, remat: str) -> None:
    x = torch.ones(7, 64, dtype=torch.float64, requires_grad=True)
    found = pipelined(drops(), devices=devices, remat=remat)(x)
    kept = found != 0
    assert 0.1 < kept.double().mean() < 0.4  # 0.7 to the fourth is 0.24
    found.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, kept)
    assert_close(x.grad, found.detach())


@pytest.mark.parametrize("remat", REMATS)
def test_a_backward_leaves_the_generator_alone(remat: str) -> None:
    pipe = pipelined(drops(), remat=remat)
    loss = pipe(torch.ones(5, 64, dtype=torch.float64)).sum()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_repeats_a_run_and_calls_differ() -> None:
    pipe, x = pipelined(drops()), torch.ones(5, 64, dtype=torch.float64)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append([pipe(x), pipe(x), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])


def test_a_step_moves_the_generator_by_the_same_on_any_plan() -> None:
    """So what the training loop draws after it does not depend on the number of devices."""
    x, states = torch.ones(6, 64, dtype=torch.float64), []
    for devices, chunks, remat in ((1, 1, "none"), (2, 3, "full"), (4, 6, "min-cut")):
        pipe = pipelined(drops(), devices=devices, chunks=chunks, remat=remat)
        torch.manual_seed(11)
        for _ in range(2):
            pipe(x).sum().backward()
        states.append(torch.get_rng_state())
    assert all(torch.equal(s, states[0]) for s in states)


@pytest.mark.parametrize("name", ["no random call", "dropout in evaluation"])
def test_a_step_without_randomness_leaves_the_generator_alone(name: str) -> None:
    model = net("nested") if name == "no random call" else drops().eval()
    x = random(5, 6) if name == "no random call" else random(5, 64)
    pipe = pipelined(model, args=(x,))
    before = torch.get_rng_state()
    pipe(x)
    assert torch.equal(torch.get_rng_state(), before)
