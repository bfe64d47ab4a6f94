"""What torchgpipe 0.0.7 promises its users, for models of any shape: the wrapper is transparent.

Truth is the model itself in eager torch, in float64, on the whole batch. What it promises about
BatchNorm, about leaks and about failures stands in the files beside this one.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import InputError
from tests.support.agreement import assert_agrees, assert_close, pipelined
from tests.support.nets import NETS, REMATS, net, random

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("alike_models_once")]


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NETS)
def test_a_net_is_itself_on_any_number_of_devices(name: str, devices: int, chunks: int) -> None:
    assert_agrees(pipelined(net(name), devices=devices, chunks=chunks), NETS[name][1](4))


@pytest.mark.parametrize("remat", ["none", "min-cut"])
@pytest.mark.parametrize("name", NETS)
def test_a_net_is_itself_with_any_rematerialization(name: str, remat: str) -> None:
    assert_agrees(pipelined(net(name), devices=3, remat=remat), NETS[name][1](7))


@pytest.mark.parametrize("order", ["aab", "aba", "aaba", "abab", "abba", "abbb"])
def test_layers_that_come_back(order: str) -> None:
    """A stage for each; which of them lends its parameters to whom differs."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(6, 6) for name in "ab"}
    model = nn.Sequential(*(m for name in order for m in (layers[name], nn.Tanh())))
    pipe = pipelined(model.double(), devices=len(order))
    assert_agrees(pipe, random(5, 6))


def test_inputs_get_their_gradients_in_a_tuple_too() -> None:
    x, y = random(5, 6).requires_grad_(), random(5, 6).requires_grad_()
    assert_agrees(pipelined(net("pairs")), (x, y))
    assert_agrees(pipelined(net("pairs that meet")), (x, y.detach()))


@pytest.mark.full
@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("wants", [True, False])
def test_a_first_stage_without_parameters(remat: str, wants: bool) -> None:
    """Nothing there wants a gradient but perhaps the input."""
    torch.manual_seed(0)
    stem = [m for _ in range(6) for m in (nn.Hardtanh(), nn.Softsign())]
    model = nn.Sequential(*stem, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = random(5, 6).requires_grad_(wants)
    pipe = pipelined(model, remat=remat, args=(x,))
    assert pipe.stages[0].parameters == ()
    assert_agrees(pipe, x)


def test_a_model_without_layers_gives_back_its_input() -> None:
    x = random(4, 6)
    assert autopipe.compile(nn.Sequential(), 1, 2)(x) is x


# ------------------------------------------------------------------------------- any batch


@pytest.mark.parametrize("chunks", [2, 3, 4, 7])
def test_batches_that_do_not_divide_or_are_smaller_than_chunks(chunks: int) -> None:
    """One pipeline, its batches growing and shrinking; gradients too."""
    pipe = pipelined(net("nested"), chunks=chunks)
    for batch in (7, 1, 5, 2, 8, 3):
        assert_agrees(pipe, random(batch, 6).requires_grad_())
        assert len(pipe.plan.sizes) == min(batch, chunks)


@pytest.mark.parametrize("name", ["convolutions", "pairs that meet"])
def test_a_batch_of_one_as_the_first_one(name: str) -> None:
    pipe = pipelined(net(name), chunks=4)
    for batch in (1, 6, 1):
        assert_agrees(pipe, NETS[name][1](batch))


def test_a_loss_over_a_batch_that_does_not_divide() -> None:
    """The mean over 7 is not the mean of the means over 3, 2 and 2."""
    model, x, target = net("nested"), random(7, 6), random(7, 3)
    twin, pipe = copy.deepcopy(model), pipelined(model)
    for module in (pipe, twin):
        F.mse_loss(module(x), target).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad)


@pytest.mark.parametrize("grad", [True, False])
def test_an_empty_batch_is_refused_with_a_reason(grad: bool) -> None:
    pipe, x = pipelined(net("linears")), random(6, 6)
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # first as the first batch of all, then as a later one
            with pytest.raises(InputError, match="without samples"):
                pipe(x[:0])
            pipe(x)
    assert_agrees(pipe, x)


# ------------------------------------------------------------------------------- modes


def test_without_gradients_nothing_is_kept_and_none_can_flow() -> None:
    pipe, x = pipelined(net("nested")), random(5, 6)
    with torch.no_grad():
        found = pipe(x.requires_grad_())
    assert not found.requires_grad
    assert [s.peak for s in pipe.memory.stages] == [0, 0]
    assert_close(found, pipe.model(x).detach())


def test_gradients_may_be_switched_on_and_off_between_calls() -> None:
    pipe, x = pipelined(net("nested")), random(5, 6)
    for _ in range(2):
        assert_agrees(pipe, x)
        with torch.no_grad():
            assert not pipe(x).requires_grad
            with torch.enable_grad():
                assert pipe(x).requires_grad


def test_gradients_flow_in_evaluation_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Tanh()
    )
    pipe = pipelined(model.double().eval())
    assert_agrees(pipe, random(7, 6).requires_grad_())


def test_a_frozen_model_passes_gradients_on_to_its_input() -> None:
    model = net("nested").requires_grad_(False)
    pipe = pipelined(model)
    assert not pipe(random(5, 6)).requires_grad
    assert_agrees(pipe, random(5, 6).requires_grad_())
    assert all(p.grad is None for p in model.parameters())


def test_a_result_can_be_detached() -> None:
    """What is computed from it without gradients needs no backward, nor does the pipeline."""
    pipe, x = pipelined(net("linears")), random(5, 6)
    found = pipe(x).detach()
    assert not found.requires_grad
    assert_close(found, pipe.model(x).detach())
    assert all(s.now == 0 for s in pipe.memory.stages)
