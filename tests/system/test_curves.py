"""Two hundred steps of training: errors that one step hides would add up here.

A GPT-2 on three devices, four micro-batches, AdamW, against the same model in eager torch from the
same seed. Summing over micro-batches rounds otherwise than summing over the batch, so there are
three comparisons: equal to the bit with eager torch over the same micro-batches; with the whole
batch in double precision, within what rounding can do; and in single precision no further from
double than eager torch itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import autopipe
from tests.support.models import gpt2
from tests.support.reference import over_chunks

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("alike_models_once")]

STEPS, RATE, EPS = 200, 3e-3, 1e-8
BATCHES = {"even": (8,), "uneven": (10, 7, 3)}
"""Batch sizes, in turn. In four micro-batches: of 3, 3, 2, 2; of 2, 2, 2, 1; of 1, 1, 1."""

Curve = tuple[Tensor, list[Tensor]]


def tokens(step: int, kind: str) -> Tensor:
    sizes = BATCHES[kind]
    generator = torch.Generator().manual_seed(step % 10)  # few batches: there is much to learn
    return torch.randint(0, 64, (sizes[step % len(sizes)], 16), generator=generator)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def ordinary(module: nn.Module, ids: Tensor) -> Tensor:
    loss = loss_of(module(input_ids=ids).logits, ids)
    loss.backward()
    return loss.detach()


def over_micro_batches(module: nn.Module, ids: Tensor) -> Tensor:
    """Eager torch: forward chunk by chunk, one loss, backward chunk by chunk."""
    outs = [module(input_ids=chunk).logits for chunk in ids.tensor_split(4) if len(chunk)]
    whole = torch.cat([o.detach() for o in outs]).requires_grad_()
    loss = loss_of(whole, ids)
    loss.backward()
    for out, gradient in zip(outs, whole.grad.split([len(o) for o in outs]), strict=True):
        out.backward(gradient)
    return loss.detach()


def train(
    model: nn.Module, step: Callable[[Tensor], Tensor], kind: str, steps: int = STEPS
) -> Curve:
    optimizer = torch.optim.AdamW(model.parameters(), RATE, eps=EPS)
    losses = []
    for n in range(steps):
        optimizer.zero_grad()
        losses.append(step(tokens(n, kind)))
        optimizer.step()
    curve = torch.stack(losses)
    assert curve[-20:].mean() < 0.8 * curve[:20].mean() or steps < STEPS, "it must learn"
    return curve, [p.detach() for p in model.parameters()]


@functools.cache
def curve(how: str, kind: str, dtype: torch.dtype) -> Curve:
    model = gpt2()[0].to(dtype)
    if how == "pipeline":
        return train(model, functools.partial(ordinary, autopipe.compile(model, 3, 4)), kind)
    step = over_micro_batches if how == "micro-batches" else ordinary
    return train(model, functools.partial(step, model), kind)


@pytest.mark.full
@pytest.mark.parametrize("kind", BATCHES)
def test_equal_to_eager_over_the_same_micro_batches(kind: str) -> None:
    """To the bit: two hundred losses, and the parameters in the end."""
    found = curve("pipeline", kind, torch.float32)
    expected = curve("micro-batches", kind, torch.float32)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.full
def test_equal_to_the_whole_batch_in_double_precision() -> None:
    """Losses to 1e-12, some thousand times the rounding of one operation.

    Parameters to what Adam can make of rounding: where a gradient is nothing but rounding, 1e-17,
    it is divided by no less than eps and goes into a step of at most RATE × 1e-17 / EPS.
    """
    found = curve("pipeline", "uneven", torch.double)
    expected = curve("whole batch", "uneven", torch.double)
    assert (found[0] - expected[0]).abs().max() < 1e-12 * expected[0].max()
    bound = STEPS * RATE * 1e-17 / EPS
    assert bound < 1e-9
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).abs().max() < bound


@pytest.mark.full
def test_as_near_to_double_precision_as_eager_is() -> None:
    """Root mean square over the curve; a factor of four for luck."""
    truth = curve("whole batch", "uneven", torch.double)[0]

    def error(how: str) -> Tensor:
        return (curve(how, "uneven", torch.float32)[0] - truth).pow(2).mean().sqrt()

    assert error("pipeline") < 4 * error("whole batch")


@pytest.mark.full
def test_with_the_models_own_loss() -> None:
    """The loss is combined from micro-batches' sums and counts; uneven, and some labels ignored.

    Truth is the captured graph under plain autograd over the same micro-batches, to the bit.
    """
    model = gpt2()[0]
    reference = copy.deepcopy(model)
    pipe = autopipe.compile(model, 3, 4)

    def call(ids: Tensor) -> dict[str, Tensor]:
        labels = ids.clone()
        labels[ids % 3 == 0] = -100
        return {"input_ids": ids, "labels": labels}

    def ours(ids: Tensor) -> Tensor:
        loss = pipe(**call(ids)).loss
        loss.backward()
        return loss.detach()

    def theirs(ids: Tensor) -> Tensor:
        leaves = pytree.tree_leaves(((), call(ids)))
        truth = over_chunks(pipe.captured, reference, leaves, 4)
        for name, gradient in truth.parameters.items():
            reference.get_parameter(name).grad = gradient
        loss: Tensor = truth.result["loss"]
        return loss.detach()

    found = train(model, ours, "uneven", steps=60)
    expected = train(reference, theirs, "uneven", steps=60)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_with_dropout_on_another_plan() -> None:
    """One seed, one curve, to the bit."""

    def run(devices: int, remat: str) -> Curve:
        model = gpt2(dropout=0.1)[0]
        pipe = autopipe.compile(model, devices, 4, remat=remat)
        torch.manual_seed(5)
        return train(model, functools.partial(ordinary, pipe), "uneven", steps=15)

    found, expected = run(3, "full"), run(1, "none")
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
