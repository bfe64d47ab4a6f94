"""torchgpipe's deferred BatchNorm, as a promise: running statistics are the mini-batch's.

In training, BatchNorm normalises each micro-batch by that micro-batch's statistics (GPipe, section
2.2). What it remembers for evaluation should be as if it had seen the whole mini-batch once. Truth
is computed with torch's own layers: a plain loop over the same chunks gives results and gradients,
and what each BatchNorm was given in that loop, put together, is given to a fresh copy of the layer.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import autopipe
from tests.support.agreement import assert_agrees, assert_close, objective, pipelined

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]

CHUNKS, BATCH = 3, 8  # micro-batches of 3, 3 and 2


SHAPES: dict[str, tuple[type[_BatchNorm], tuple[int, ...]]] = {
    "of vectors": (nn.BatchNorm1d, (4,)),
    "of sequences": (nn.BatchNorm1d, (4, 5)),
    "of images": (nn.BatchNorm2d, (4, 3, 5)),
    "of volumes": (nn.BatchNorm3d, (4, 2, 3, 2)),
}


class Net(nn.Module):
    """Two BatchNorm layers between elementwise scales of their channels."""

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(norms)
        self.scales = nn.ParameterList(torch.rand(4) + 0.5 for _ in range(len(norms) + 1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.dim() - 2)
        for scale, norm in zip(self.scales, self.norms, strict=False):
            x = norm(torch.tanh(x * scale.view(shape)) + x)
        return torch.tanh(x * self.scales[-1].view(shape))


def net(kind: str = "of vectors", **options: Any) -> Net:
    layer, _ = SHAPES[kind]
    return Net([layer(4, **options), layer(4, **options)])


def batch(kind: str = "of vectors", seed: int = 0) -> Tensor:
    """Samples whose mean and spread drift, so that micro-batches differ from one another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, *SHAPES[kind][1], generator=generator, dtype=torch.float64)
    drift = torch.arange(1.0, BATCH + 1).double().view(-1, *[1] * (x.dim() - 1))
    return x * drift + drift


def over_chunks(model: nn.Module, x: Tensor, chunks: int = CHUNKS) -> Tensor:
    """The result, chunk by chunk; each BatchNorm's buffers afterwards are as if it had seen, in
    each of its calls, all chunks at once."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    fresh = [copy.deepcopy(m) for m in norms]
    given: dict[nn.Module, list[list[Tensor]]] = defaultdict(list)  # per chunk, its inputs
    hooks = [
        m.register_forward_pre_hook(lambda m, inputs: given[m][-1].append(inputs[0].detach()))
        for m in norms
    ]
    parts = []
    for chunk in x.tensor_split(chunks):
        for m in norms:
            given[m].append([])
        parts.append(model(chunk))
    for hook in hooks:
        hook.remove()
    for norm, twin in zip(norms, fresh, strict=True):
        for inputs in zip(*given[norm], strict=True):
            twin(torch.cat(inputs))
        for name, buffer in twin.named_buffers():
            setattr(norm, name, buffer)  # autograd has saved the old one: it must not change
    return torch.cat(parts)


def assert_deferred(model: nn.Module, kind: str, steps: int, **options: Any) -> None:
    """Training steps: results, parameters, and buffers are those of `over_chunks`."""
    twin, pipe = copy.deepcopy(model), pipelined(model, chunks=CHUNKS, **options)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    for step in range(steps):
        x = batch(kind, step)
        found, expected = pipe(x), over_chunks(twin, x)
        assert_close(found, expected, f"result of step {step}")
        for result, optimizer in zip((found, expected), optimizers, strict=True):
            optimizer.zero_grad()
            objective(result).backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p, q, name)
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert_close(b, c, name)


# ------------------------------------------------------------------------------- deferred


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", SHAPES)
def test_running_statistics_are_the_mini_batchs(kind: str, steps: int) -> None:
    assert_deferred(net(kind), kind, steps)


@pytest.mark.parametrize("remat", ["none", "min-cut"])
@pytest.mark.parametrize("devices", [1, 3])
def test_they_do_not_depend_on_the_plan(devices: int, remat: str) -> None:
    assert_deferred(net(), "of vectors", 2, devices=devices, remat=remat)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_cumulative_average_counts_mini_batches(steps: int) -> None:
    assert_deferred(net(momentum=None), "of vectors", steps)


def test_another_momentum_and_no_affine_parameters() -> None:
    assert_deferred(net(momentum=0.7, affine=False), "of vectors", 2)


def test_one_layer_used_twice_is_updated_twice() -> None:
    """In the order of its calls, each time with the whole mini-batch."""
    shared = nn.BatchNorm1d(4)
    model = Net([shared, shared])
    assert_deferred(model, "of vectors", 2)
    assert shared.num_batches_tracked == 4


def test_a_frozen_layer_stays_while_another_learns() -> None:
    model = net()
    model.norms[0].eval()
    before = [b.clone() for b in model.norms[0].buffers()]
    assert_deferred(model, "of vectors", 2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.norms[0].buffers(), strict=True))


def test_a_forward_without_gradients_updates_them_too() -> None:
    """In eager torch they are updated whenever the layer is in training mode."""
    model = net()
    twin = copy.deepcopy(model)
    pipe = pipelined(model, chunks=CHUNKS)
    with torch.no_grad():
        assert_close(pipe(batch()), over_chunks(twin, batch()))
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert_close(b, c, name)


def test_a_mini_batch_counts_as_one() -> None:
    pipe = pipelined(net(), chunks=CHUNKS)
    for step in range(4):
        objective(pipe(batch(seed=step))).backward()
    assert [int(m.num_batches_tracked) for m in pipe.model.norms] == [4, 4]


def test_evaluation_uses_them() -> None:
    model = net()
    twin = copy.deepcopy(model)
    pipe = pipelined(model, chunks=CHUNKS)
    pipe(batch())
    over_chunks(twin, batch())
    assert_close(pipe.eval()(batch(seed=1)), twin.eval()(batch(seed=1)))


# ------------------------------------------------------------------------------- what holds anyway


@pytest.mark.parametrize("kind", SHAPES)
def test_normalisation_is_by_micro_batch(kind: str) -> None:
    """Results and gradients, whatever becomes of the statistics."""
    model = net(kind)
    twin = copy.deepcopy(model)
    x, y = (batch(kind).requires_grad_() for _ in range(2))
    found, expected = pipelined(model, chunks=CHUNKS)(x), over_chunks(twin, y)
    assert_close(found, expected)
    objective(found).backward()
    objective(expected).backward()
    assert_close(x.grad, y.grad)
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert_close(p.grad, q[1].grad, name)


@pytest.mark.parametrize("kind", SHAPES)
def test_in_one_micro_batch_it_is_the_models_own(kind: str) -> None:
    assert_agrees(pipelined(net(kind), chunks=1), batch(kind))


def test_without_running_statistics_there_is_nothing_to_defer() -> None:
    model = net(track_running_stats=False)
    assert list(model.buffers()) == []
    assert_deferred(model, "of vectors", 2)


def test_frozen_statistics_are_used_and_stay() -> None:
    model = net()
    for norm in model.norms:
        norm.eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert_agrees(pipelined(model, chunks=CHUNKS), batch().requires_grad_())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_the_last_batch_of_an_epoch_is_cut_into_fewer_micro_batches() -> None:
    """Of one sample each, they would have no statistics."""
    model = net()
    twin, pipe = copy.deepcopy(model), pipelined(model, devices=2, chunks=CHUNKS)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    data = torch.cat([batch(seed=seed) for seed in range(4)])
    for count in (len(batch()), CHUNKS, CHUNKS + 1, 3, 2):
        x, data = data[:count], data[count:]
        chunks = min(CHUNKS, count // 2)
        found, expected = pipe(x), over_chunks(twin, x, chunks)
        assert len(pipe.plan.sizes) == chunks
        assert_close(found, expected, f"result of {count} samples")
        for result, optimizer in zip((found, expected), optimizers, strict=True):
            optimizer.zero_grad()
            objective(result).backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert_close(p, q[1], name)
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert_close(b, c, name)


# ------------------------------------------------------------------------------- micro


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("kind", SHAPES)
def test_on_request_each_micro_batch_updates_them(kind: str, devices: int) -> None:
    model = net(kind)
    twin = copy.deepcopy(model)
    pipe = autopipe.compile(model, devices, CHUNKS, batch_norm="micro")
    for step in range(2):
        x = batch(kind, step)
        objective(pipe(x)).backward()
        objective(torch.cat([twin(chunk) for chunk in x.tensor_split(CHUNKS)])).backward()
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert_close(b, c, name)
    assert [int(m.num_batches_tracked) for m in model.norms] == [2 * CHUNKS] * 2
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad, name)


def test_a_cumulative_average_of_micro_batches_is_refused() -> None:
    norm = nn.BatchNorm1d(4, momentum=None)
    with pytest.raises(autopipe.errors.UnsupportedError, match="cumulative"):
        pipelined(norm, devices=1, batch_norm="micro")(torch.randn(8, 4))
    assert norm.momentum is None
