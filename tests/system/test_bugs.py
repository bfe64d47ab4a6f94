"""One story per bug. Each test failed before its fix."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.call_signature import flatten
from tests.support.models import MODELS, gpt2
from tests.support.reference import objective, over_chunks


def test_one_tensor_for_two_arguments() -> None:
    """``model(input_ids=ids, labels=ids)`` is how causal language models are called. The exporter
    took the one tensor for one input and read the labels from the ids, also in later calls."""
    model, inputs = gpt2()
    pipe = autopipe.compile(model, 2, 2)
    ids = inputs(4)[1]["input_ids"]
    pipe(input_ids=ids, labels=ids)
    labels = (ids + 1) % 64
    expected = model(input_ids=ids, labels=labels).loss
    assert torch.allclose(pipe(input_ids=ids, labels=labels).loss, expected)
    assert not torch.allclose(pipe(input_ids=ids, labels=ids).loss, expected)


def test_a_saved_value_with_the_name_of_a_received_one() -> None:
    """A generated function took a stage's input for a saved value of the same name."""
    model, inputs = MODELS["fan_out"].make()
    truth: dict[str, Tensor] = {}
    for remat in ("full", "none"):
        model.zero_grad()
        pipe = autopipe.compile(model, 2, 1, remat=remat)
        objective(pipe(*inputs(4)[0])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(truth.setdefault(name, parameter.grad), parameter.grad)


def test_workers_use_as_many_threads_per_operator_as_the_caller() -> None:
    """A new thread starts with OpenMP's default; sums split otherwise are other sums."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(4, 8, 24, 24)
    gradients = []
    for devices in (1, 2):
        model.zero_grad()
        pipe = autopipe.compile(model, ["cpu"] * devices, 1)
        pipe(x).pow(2).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_costs_do_not_fix_the_batch_size() -> None:
    """Counting FLOPs on the exporter's own symbolic tensors made an upsample guard on the batch,
    and from then on every size in the graph was the example's."""
    model, inputs = MODELS["unet"].make()
    pipe = autopipe.compile(model, 2, 1, args=inputs(4)[0])
    flops = sum(stage.cost.flops for stage in pipe.stages)
    assert flops.subs("B", 0) == 0
    assert flops.subs("B", 6) == 6 * flops.subs("B", 1) > 0
    assert pipe(*inputs(6)[0]).sample.shape[0] == 6


def test_compiling_leaves_no_thread() -> None:
    """torch.fx's interpreter makes a progress bar, whose monitor is a thread for good."""
    before = set(threading.enumerate())
    autopipe.compile(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), 1, 2, args=(torch.ones(4, 3),))
    assert set(threading.enumerate()) <= before


def test_lstm_with_onednn() -> None:
    """Its fake forward has no workspace, and its kernel makes one only while gradients are on."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.cells(x)[0]

    torch.manual_seed(0)
    model, x = Tagger(), torch.randn(4, 3, 4)
    for remat in ("none", "full"):
        model.zero_grad()
        autopipe.compile(model, 1, 2, remat=remat)(x).sum().backward()
        ours = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x).sum().backward()
        for a, p in zip(ours, model.parameters(), strict=True):
            assert torch.allclose(a, p.grad, atol=1e-6)


def test_writing_in_place_where_gradients_are_off() -> None:
    """Only the results of a no_grad region were cut from the graph; what it wrote in place to a
    buffer then carried a gradient into the next micro-batch."""

    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("norm", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.norm.mul_(0.5).add_(self.layer.weight.norm(dim=1), alpha=0.5)
            return self.layer(x) / self.norm

    torch.manual_seed(0)
    model, reference = Average(), Average()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(6, 3)
    autopipe.compile(model, 1, 3, batch_norm="micro")(x).sum().backward()
    for chunk in x.tensor_split(3):
        reference(chunk).sum().backward()
    assert torch.allclose(model.norm, reference.norm)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad)


@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.full)])
def test_group_norm_of_one_sample(batch: int) -> None:
    """With one sample the strides of the batch dimension are arbitrary: the traced group norm
    expected another memory format than the real tensor had."""
    model, inputs = MODELS["unet"].make()
    pipe = autopipe.compile(model, 2, batch)
    args: Any = inputs(batch)[0]
    assert torch.allclose(pipe(*args).sample, model(*args).sample, atol=1e-5)


def test_a_stage_does_not_count_the_cost_of_what_it_receives() -> None:
    """A received value has the name of the call that made it, two stages before."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    plan = autopipe.plan(model, 3, 2, args=(torch.ones(4, 4),))
    assert [s.flops for s in plan.stages] == [2 * 2 * 2 * 4 * 4] * 3


def test_constants_of_a_model_captured_on_meta() -> None:
    """Tensors made in the forward of a meta model were captured on meta too, without a value."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x) / torch.tensor(3.0, device=x.device)
            return self.last(torch.tanh(x)) + torch.arange(4.0, device=self.last.weight.device)

    torch.manual_seed(0)
    values, x = Scaled(), torch.randn(6, 4)
    with torch.device("meta"):
        model = Scaled()
    pipe = autopipe.compile(model, ["cpu"] * 2, 3, args=(x,))
    assert all(p.is_meta for p in model.parameters()), "capture leaves the model alone"
    pipe.load_state_dict(values.state_dict(), assign=True)
    assert torch.allclose(pipe(x), values(x), atol=1e-6)
    pipe(x).sum().backward()
    values(x).sum().backward()
    for p, q in zip(model.parameters(), values.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)


@pytest.mark.full
def test_gpt2_captured_on_meta() -> None:
    values, inputs = gpt2()
    with torch.device("meta"):
        model, _ = gpt2()
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, kwargs=inputs(4)[1])
    pipe.load_state_dict(values.state_dict(), assign=True)
    model.tie_weights()
    assert torch.allclose(pipe(**inputs(4)[1]).loss, values(**inputs(4)[1]).loss)


def test_batch_norm_of_what_was_transposed() -> None:
    """Channels last in a sequence, as after a recurrent layer, and a view before it: batch norm's
    backward gives other strides than its fake does, which the view that was traced did not fit."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x).flatten(0, 1).sin().view_as(x)
            return self.norm(y.transpose(1, 2)).transpose(1, 2).square().mean()

    torch.manual_seed(0)
    pipe = autopipe.compile(Net(), 1, 2)
    x = torch.randn(6, 3, 4)
    pipe(x).backward()
    assert pipe.verify(x).ok


@pytest.mark.full
def test_a_cut_before_an_upsampling_bit_for_bit_with_one_sample() -> None:
    """Of the U-Net of the tests, in micro-batches of one sample (with more it was equal): a stage
    gave what it received the strides that tracing had believed in, and these were wrong."""
    model, inputs = MODELS["unet"].make()
    args: Any = inputs(4)[0]
    plan = autopipe.plan(model, ["cpu"] * 2, 4, remat="none", args=args)
    last = dataclasses.replace(plan.stages[1], first="upsample_nearest2d")
    pipe = autopipe.compile(model, plan=dataclasses.replace(plan, stages=(plan.stages[0], last)))
    result = pipe(*args)
    truth = over_chunks(pipe.captured, model, flatten(args, {})[0], 4)
    objective(result).backward()
    assert torch.equal(result.sample, truth.result.sample)
    for name, gradient in truth.parameters.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name
