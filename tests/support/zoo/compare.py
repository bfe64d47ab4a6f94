"""A pipeline of three stages and three chunks against the model itself, on one training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import autopipe
from autopipe.call_signature import flatten
from autopipe.runtime.random import MicroBatchContext, step_seed
from tests.support.reference import over_chunks
from tests.support.zoo.entry import BATCH, Entry

DEVICES, CHUNKS = 3, 3
"""Of a batch of eight: micro-batches of two sizes."""

# One tolerance for all: what the project promises in float32, in which models are trained. Double
# precision would see smaller mistakes, but it is not available for all: experts multiply with a
# kernel that has no double (Mixtral, Qwen2-MoE), Gemma 2's eager attention is NaN in double, and
# what is computed in float32 whatever the parameters are (the normalizations of Gemma and Mamba)
# leaves 1e-8 of rounding. So instead no gradient is left small: see `SPREAD`, `training` and
# `test_no_gradient_is_too_small_to_be_missed`.
TOLERANCE = 2e-6


CONSTANTS: Mapping[str, float] = {"bernoulli": 1, "rand": 0.5, "rand_like": 0.5}
"""What random operators give in the comparison with eager torch: dropout keeps everything."""


@dataclass(frozen=True)
class Agreement:
    """What the pipeline computes beside eager torch, where dropout keeps everything.

    Attributes:
        nodes: of the captured graph.
        parameters: of the model, numbers in all.
        stages: how many.
        loss: difference, relative.
        gradient: largest difference of an entry of a gradient, relative to the model's largest.
        worst: the parameter where that is.
        missing: parameters which have a gradient in one and none in the other.
    """

    nodes: int
    parameters: int
    stages: int
    loss: float
    gradient: float
    worst: str
    missing: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Within the tolerance. (Written so that NaN is not.)"""
        return not self.missing and self.loss <= TOLERANCE and self.gradient <= TOLERANCE


@dataclass(frozen=True)
class Randomness:
    """What the pipeline computes where dropout drops.

    Attributes:
        same: loss and gradients are, to the bit, those of the captured graph under plain autograd,
            with every number drawn by its key (`tests.support.reference`).
        moves: another seed gives another loss.
    """

    same: bool
    moves: bool


Step = tuple[Tensor, dict[str, Tensor | None]]


def compare_with_eager(entry: Entry) -> tuple[Agreement, Randomness]:
    """Compare training steps with dropout. Raises what the pipeline raises."""
    model, inputs = entry.build(True)
    pipe = compiled(entry, model)
    return _agreement(entry, pipe, inputs), _randomness(entry, pipe, inputs)


def _agreement(entry: Entry, pipe: autopipe.Pipeline, inputs: dict[str, Any]) -> Agreement:
    with _Constant():
        expected_loss, expected = eager(entry, pipe.model, inputs)
    with _constant_draws():
        loss, found = step(entry, pipe, inputs)
    scale = torch.stack([g.abs().max() for g in expected.values() if g is not None]).max()
    both = [n for n, g in expected.items() if g is not None and found[n] is not None]
    differences = torch.stack([(found[n] - expected[n]).abs().max() for n in both])
    return Agreement(
        nodes=len(pipe.captured.graph_module.graph.nodes),
        parameters=sum(p.numel() for p in pipe.model.parameters()),
        stages=len(pipe.stages),
        loss=((loss - expected_loss) / expected_loss).abs().item(),
        gradient=(differences.max() / scale).item(),
        worst=both[int(differences.argmax())],
        missing=tuple(n for n, g in expected.items() if (g is None) != (found[n] is None)),
    )


def _randomness(entry: Entry, pipe: autopipe.Pipeline, inputs: dict[str, Any]) -> Randomness:
    torch.manual_seed(5)
    truth = over_chunks(
        pipe.captured,
        pipe.model,
        flatten((), inputs)[0],
        CHUNKS,
        seed=step_seed(),
        loss=entry.loss,
    )
    loss, gradients = step(entry, pipe, inputs, seed=5)
    moved, _ = step(entry, pipe, inputs, seed=6)
    same = torch.equal(loss, entry.loss(truth.result))
    for name, gradient in truth.parameters.items():
        found = gradients[name]
        if found is None or gradient is None:
            same = same and found is gradient
        else:
            same = same and torch.equal(found, gradient)
    return Randomness(same, moves=not torch.equal(loss, moved))


class _Constant(TorchDispatchMode):
    """Random operators of eager torch give the constants of `CONSTANTS`: so one step over the whole
    batch can be compared with one in chunks."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _constant(op, op(*args, **kwargs or {}))


def _constant(op: Any, result: Any) -> Any:
    constant = CONSTANTS.get(op._schema.name.removeprefix("aten::").rstrip("_"))
    return result if constant is None else result.fill_(constant)


@contextmanager
def _constant_draws() -> Iterator[None]:
    """And so do those of a pipeline."""
    draw = MicroBatchContext.draw

    def constant(self: MicroBatchContext, index: int, op: Any, /, *args: Any, **more: Any) -> Any:
        return _constant(op, draw(self, index, op, *args, **more))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatchContext, "draw", constant)
        yield


def compiled(entry: Entry, model: nn.Module) -> autopipe.Pipeline:
    """The pipeline."""
    return autopipe.compile(model, devices=DEVICES, chunks=CHUNKS, in_dims=entry.in_dims)


def step(entry: Entry, pipe: nn.Module, inputs: dict[str, Any], seed: int = 0) -> Step:
    """Loss and gradients, by the model's names for its parameters."""
    pipe.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = entry.loss(pipe(**inputs))
    loss.backward()
    return loss.detach(), taken(pipe)


def eager(entry: Entry, model: nn.Module, inputs: dict[str, Any]) -> Step:
    """The truth: the whole batch at once; for a model with BatchNorm, which sees one micro-batch at
    a time, the plain loop over the same chunks, the losses weighted by their sizes."""
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        found = step(entry, model, inputs)
        model.zero_grad(set_to_none=True)
        return found
    total = torch.zeros(())
    for chunk in torch.arange(BATCH).tensor_split(CHUNKS):
        part = {name: x[chunk] for name, x in inputs.items()}
        loss = entry.loss(model(**part)) * (len(chunk) / BATCH)
        loss.backward()
        total = total + loss.detach()
    found = total, taken(model)
    model.zero_grad(set_to_none=True)
    return found


def taken(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients, by name; those of the model are dropped by `zero_grad`, so no copy is needed."""
    return {name: p.grad for name, p in model.named_parameters()}
