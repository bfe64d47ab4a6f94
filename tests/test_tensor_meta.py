"""Metadata of calls and models, and the requests that are made of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopipe.call_signature import flatten
from autopipe.passes.phases import TensorMeta
from autopipe.passes.remat_policies import LADDER
from autopipe.tensor_meta import input_metadata, state_metadata, training_request, usual_outputs
from tests.support.programs import CPU, captured_of, split_of


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("mask", torch.ones(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.last(torch.tanh(self.first(x * self.mask)))
        return y, y.square().mean()


X = torch.randn(8, 6)


def test_inputs_are_described_in_a_micro_batch() -> None:
    captured = captured_of(Scored(), X)
    x = X.t().contiguous().t().requires_grad_()
    (found,) = input_metadata(captured, [x], 3).values()
    assert found == TensorMeta((3, 6), (1, 3), torch.float32, True)  # as a copy of its part


def test_state_is_described_as_it_is() -> None:
    model = Scored()
    model.first.requires_grad_(False)
    captured = captured_of(model, X)
    found = state_metadata(captured, lambda item: captured.tensor_of(model, item))
    frozen = {name: meta.requires_grad for name, meta in found.items()}
    assert {n for n, grad in frozen.items() if grad} == {"p_last_weight", "p_last_bias"}
    assert found["p_last_weight"].shape == (3, 6)
    assert len(found) == 5


def test_a_loss_is_the_usual_output() -> None:
    captured = captured_of(Scored(), X)
    (loss,) = usual_outputs(captured)
    assert loss == captured.outputs[1].name
    without = captured_of(nn.Linear(6, 3), X)
    assert usual_outputs(without) == {without.outputs[0].name}


def test_a_request_has_metadata_for_each_size_once() -> None:
    model = Scored()
    split = split_of(model, 2, X)
    leaves, _ = flatten((X,), {})
    request = training_request(model, split, leaves, [3, 3, 2], [CPU, CPU], LADDER[:1] * 2)
    assert [*request.metadata] == [3, 2]
    names = [i.name for i in split.captured.inputs]
    assert all({*names} == {*metadata} for metadata in request.metadata.values())
    assert request.grad
    assert request.differentiated == usual_outputs(split.captured)
