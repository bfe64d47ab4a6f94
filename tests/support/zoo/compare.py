"""A pipeline of three stages and three chunks against the model itself, on one training step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import autopipe
from tests.support.zoo.entry import BATCH, Entry

DEVICES = 3
CHUNKS, EQUAL_CHUNKS = 3, 4
"""Of a batch of eight: micro-batches of two sizes, and of one (half the time to trace)."""

# One tolerance for all: what the project promises in float32, in which models are trained. Double
# precision would see smaller mistakes, but it is not available for all: experts multiply with a
# kernel that has no double (Mixtral, Qwen2-MoE), Gemma 2's eager attention is NaN in double, and
# what is computed in float32 whatever the parameters are (the normalizations of Gemma and Mamba)
# leaves 1e-8 of rounding. So instead no gradient is left small: see `SPREAD`, `training` and
# `test_no_gradient_is_too_small_to_be_missed`.
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Agreement:
    """What the pipeline computes with dropout off, beside eager torch.

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
    """What the pipeline computes with dropout on.

    Attributes:
        same: from the same seed, equal to the bit: the loss on one device and on three, and there
            loss and gradients, whether activations are saved or recomputed.
        moves: another seed gives another loss.
    """

    same: bool
    moves: bool


Step = tuple[Tensor, dict[str, Tensor | None]]


def agreement(entry: Entry) -> Agreement:
    """Compare one step with dropout off. Raises what the pipeline raises."""
    model, inputs = entry.build(False)
    expected_loss, expected = eager(entry, model, inputs)
    pipe = compiled(entry, model, DEVICES)
    loss, found = step(entry, pipe, inputs)
    scale = torch.stack([g.abs().max() for g in expected.values() if g is not None]).max()
    both = [n for n, g in expected.items() if g is not None and found[n] is not None]
    differences = torch.stack([(found[n] - expected[n]).abs().max() for n in both])
    return Agreement(
        nodes=len(pipe.captured.graph_module.graph.nodes),
        parameters=sum(p.numel() for p in model.parameters()),
        stages=len(pipe.stages),
        loss=((loss - expected_loss) / expected_loss).abs().item(),
        gradient=(differences.max() / scale).item(),
        worst=both[int(differences.argmax())],
        missing=tuple(n for n, g in expected.items() if (g is None) != (found[n] is None)),
    )


def randomness(entry: Entry) -> Randomness:
    """Compare steps with dropout on. Raises what the pipeline raises."""
    model, inputs = entry.build(True)
    pipe = compiled(entry, model, DEVICES, EQUAL_CHUNKS)
    loss, gradients = step(entry, pipe, inputs, seed=5)
    moved, _ = step(entry, pipe, inputs, seed=6)
    stages = tuple(replace(stage, remat="none") for stage in pipe.plan.stages)
    plan = replace(pipe.plan, stages=stages)  # the same cut
    saving = autopipe.compile(model, plan=plan, in_dims=entry.in_dims)
    again, others = step(entry, saving, inputs, seed=5)
    alone = compiled(entry, model, 1, EQUAL_CHUNKS)
    torch.manual_seed(5)
    with torch.no_grad():
        first = entry.loss(alone(**inputs))
    same = torch.equal(loss, again) and torch.equal(loss, first)
    for a, b in zip(gradients.values(), others.values(), strict=True):
        same = same and (a is b is None or (a is not None and b is not None and torch.equal(a, b)))
    return Randomness(same, moves=not torch.equal(loss, moved))


def compiled(
    entry: Entry, model: nn.Module, devices: int, chunks: int = CHUNKS
) -> autopipe.Pipeline:
    """The pipeline."""
    return autopipe.compile(model, devices=devices, chunks=chunks, in_dims=entry.in_dims)


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
