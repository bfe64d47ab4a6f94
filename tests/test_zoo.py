"""The zoo: well-known architectures, unmodified, train as pipelines with eager torch's gradients.

What is compared with what is said in `tests.zoo.compare`; docs/zoo.md is the table of it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autopipe

from .zoo import TOLERANCE, ZOO, Entry, WayOut, agreement, randomness
from .zoo.compare import CHUNKS, eager, step
from .zoo.speech import captioned, clip

EXPERTS = (
    "CouplingError: the histogram that sorts tokens by expert counts over all samples, though no"
    " token's result depends on another's"
)
REFUSED = {
    "BLOOM": "CaptureError: a custom autograd.Function, its GELU, is refused",
    "Mixtral": EXPERTS,
    "Qwen2-MoE": EXPERTS,
    "DeepSeek-V3": EXPERTS,
    "RecurrentGemma": "CaptureError: a custom autograd.Function, a square root's, is refused",
    "VideoMAE": "CouplingError: `x + table.type_as(x)` passes for a reduction of x over the batch",
    "Longformer": "InputError: capture._batch_range takes the bounds of every symbol, here of the"
    " unused truth value of `is_global_attn`, for those of the batch",
}
"""Models that do not train as a pipeline, and why."""


KEYS = r"key|pos_key_proj|k_proj|k_lin|to_k|attn\.k"
NORMALIZED = (
    r"project_bn|reduce_1x1\.normalization|linear_projections\.\d\.proj|stages\.1\.layer_norm"
)
CANCELS = f"{KEYS}|{NORMALIZED}"
"""Layers whose bias changes nothing: it moves all of a softmax's arguments, or the next BatchNorm
takes it away."""


def marked(names: Iterable[str], failing: dict[str, str]) -> list[Any]:
    """Parameters of a test; those in `failing` fail, and why."""
    marks = {n: [pytest.mark.xfail(strict=True, reason=r)] for n, r in failing.items()}
    return [pytest.param(n, marks=marks.get(n, [])) for n in names]


each = pytest.mark.parametrize("name", marked(ZOO, REFUSED))


def test_the_zoo_has_fifty_architectures() -> None:
    assert len(ZOO) >= 50
    for entry in ZOO.values():
        model, inputs = entry.build(False)
        assert model.training
        assert len(next(iter(inputs.values()))) == 8


@pytest.mark.parametrize("name", ZOO)
def test_no_gradient_is_too_small_to_be_missed(name: str) -> None:
    """The tolerance is relative to the model's largest gradient, so every other must be visible
    beside it, but for those that are zero: of what is not used, and of biases that cancel."""
    model, inputs = ZOO[name].build(False)
    _, gradients = eager(ZOO[name], model, inputs)
    sizes = {n: g.abs().max().item() for n, g in gradients.items() if g is not None}
    limit = 10 * TOLERANCE * max(sizes.values())
    small = [n for n, size in sizes.items() if 0 < size < limit]
    assert [n for n in small if not re.search(rf"({CANCELS})\.bias$", n)] == []
    assert len(small) < len(sizes) / 4


@each
def test_a_training_step_is_eager_torchs(name: str) -> None:
    found = agreement(ZOO[name])
    assert found.stages == 3
    assert found.missing == ()
    assert found.loss <= TOLERANCE
    assert found.gradient <= TOLERANCE, found.worst


@each
def test_dropout_is_the_same_on_one_device_and_on_three(name: str) -> None:
    found = randomness(ZOO[name])
    assert found.same
    assert found.moves == ZOO[name].random


# ------------------------------------------------------------------------------------- ways out

WAYS = {f"{n}: {w.choice}": w for n, e in ZOO.items() for w in e.ways_out}
FIXED = "the sizes of a mask that numpy draws fix the batch's: said so, but without the line"
GENERAL = "the remedy is for whoever wrote the model and does not mention a library's options"
NO_LINE = {"HuBERT: apply_spec_augment=False": FIXED}
NO_OPTION = {n: GENERAL for n, w in WAYS.items() if w.said in w.choice}


def each_way(failing: dict[str, str]) -> Any:
    return pytest.mark.parametrize("way", marked(WAYS, failing))


def refusal(way: WayOut) -> autopipe.errors.AutopipeError:
    model, inputs = way.without(False)
    with pytest.raises(autopipe.errors.AutopipeError) as caught:
        autopipe.compile(model, devices=3, chunks=CHUNKS)(**inputs)
    return caught.value


@each_way(NO_LINE)
def test_a_model_that_needs_a_choice_is_refused_with_its_line(way: str) -> None:
    error = refusal(WAYS[way])
    assert re.search(r"/modeling_\w+\.py:\d+$", error.source or "")
    assert error.remedy


@each_way(NO_OPTION)
def test_the_refusal_says_which_choice(way: str) -> None:
    assert WAYS[way].said in str(refusal(WAYS[way]))


# ----------------------------------------------------------------------------------------- CLIP


def test_clips_loss_outside_of_the_pipeline_is_clips_loss() -> None:
    """So the way out is not another objective."""
    model, inputs = clip(False)
    expected, gradients = step(Entry("", "", clip), model, inputs | {"return_loss": True})
    outside, inputs = ZOO["CLIP"].build(False)
    loss, found = step(ZOO["CLIP"], autopipe.compile(outside, devices=3, chunks=CHUNKS), inputs)
    assert abs(loss - expected) <= TOLERANCE * expected
    scale = max(g.abs().max() for g in gradients.values() if g is not None)
    for name, gradient in gradients.items():
        assert (found[f"clip.{name}"] - gradient).abs().max() <= TOLERANCE * scale


@pytest.mark.xfail(
    strict=True, reason="it is said that the batch size is fixed, without a line of the model"
)
def test_clips_contrastive_loss_is_refused_where_it_couples_samples() -> None:
    model, _ = clip(False)
    with pytest.raises(autopipe.errors.AutopipeError) as caught:
        autopipe.compile(model, devices=3, chunks=CHUNKS)(**captioned(), return_loss=True)
    assert re.search(r"/modeling_clip\.py:\d+$", caught.value.source or "")


# ------------------------------------------------------------------------- other random numbers


@pytest.mark.xfail(strict=True, reason="drawn once, at capture, and a constant from then on")
def test_numbers_that_numpy_draws_are_refused_or_drawn_anew() -> None:
    """As in the masks of SpecAugment, where sizes other than the batch's are masked."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            kept = torch.from_numpy(np.random.rand(4) < 0.5)
            return self.last(torch.tanh(self.first(x)) * kept)

    torch.manual_seed(0)
    pipe, x = autopipe.compile(Masked(), devices=1, chunks=3), torch.randn(6, 4)
    with contextlib.suppress(autopipe.errors.CaptureError):
        results = [pipe(x) for _ in range(20)]
        assert any(not torch.equal(result, results[0]) for result in results)
