"""The zoo: well-known architectures, unmodified, train as pipelines with eager torch's gradients.

What is compared with what is said in `tests.zoo.compare`; docs/zoo.md is the table of it.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

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
    "Longformer": "InputError: capture._batch_range takes the bounds of every symbol, here of the"
    " unused truth value of `is_global_attn`, for those of the batch",
}
"""Models that do not train as a pipeline, and why."""


def each(names: Any) -> Any:
    marks = {n: [pytest.mark.xfail(strict=True, reason=r)] for n, r in REFUSED.items()}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks.get(n, [])) for n in names])


def test_the_zoo_has_fifty_architectures() -> None:
    assert len(ZOO) >= 50
    for entry in ZOO.values():
        model, inputs = entry.build(False)
        assert model.training
        assert all(len(x) == 8 for x in inputs.values())


@pytest.mark.parametrize("name", ZOO)
def test_no_gradient_is_too_small_to_be_missed(name: str) -> None:
    """The tolerance is relative to the model's largest gradient, so every other must be visible
    beside it, but for biases that cancel: of keys in a softmax and before a normalization."""
    model, inputs = ZOO[name].build(False)
    _, gradients = eager(ZOO[name], model, inputs)
    sizes = {n: g.abs().max().item() for n, g in gradients.items() if g is not None}
    cancels = r"(key|pos_key_proj|k_proj|k_lin|to_k|attn\.k|project_bn|reduce_1x1\.normalization)"
    small = [n for n, size in sizes.items() if size < 10 * TOLERANCE * max(sizes.values())]
    assert [n for n in small if not re.search(cancels + r"\.bias$", n)] == []
    assert len(small) < len(sizes) / 4


@each(ZOO)
def test_a_training_step_is_eager_torchs(name: str) -> None:
    found = agreement(ZOO[name])
    assert found.stages == 3
    assert found.missing == ()
    assert found.loss <= TOLERANCE
    assert found.gradient <= TOLERANCE, found.worst


@each(ZOO)
def test_dropout_is_the_same_on_one_device_and_on_three(name: str) -> None:
    found = randomness(ZOO[name])
    assert found.same
    assert found.moves == ZOO[name].random


# ------------------------------------------------------------------------------------- ways out

WAYS = {f"{n}: {w.choice}": w for n, e in ZOO.items() for w in e.ways_out}
UNSAID = "the remedy is for whoever wrote the model, it says nothing of options such as this one"
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def refusal(way: WayOut) -> autopipe.errors.AutopipeError:
    model, inputs = way.without(False)
    with pytest.raises(autopipe.errors.AutopipeError) as caught:
        autopipe.compile(model, devices=3, chunks=CHUNKS)(**inputs)
    return caught.value


@ways
def test_a_model_that_needs_a_choice_is_refused_with_its_line(way: WayOut) -> None:
    error = refusal(way)
    assert re.search(r"/modeling_\w+\.py:\d+$", error.source or "")
    assert error.remedy


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way,
            id=name,
            marks=[pytest.mark.xfail(strict=True, reason=UNSAID)] if "=" in name[:-7] else [],
        )
        for name, way in WAYS.items()
    ],
)
def test_the_refusal_says_which_choice(way: WayOut) -> None:
    assert way.said in str(refusal(way))


# ----------------------------------------------------------------------------------------- CLIP


def test_clips_loss_outside_of_the_pipeline_is_clips_loss() -> None:
    """So the way out is not another objective."""
    model, inputs = clip(False)
    expected, gradients = step(Entry("", "", clip), model, inputs | {"return_loss": True})
    outside, inputs = ZOO["CLIP"].build(False)
    loss, found = step(ZOO["CLIP"], autopipe.compile(outside, devices=3, chunks=CHUNKS), inputs)
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[f"clip.{name}"], gradient, rtol=0, atol=2e-6)


@pytest.mark.xfail(
    strict=True, reason="it is said that the batch size is fixed, without a line of the model"
)
def test_clips_contrastive_loss_is_refused_where_it_couples_samples() -> None:
    model, _ = clip(False)
    with pytest.raises(autopipe.errors.AutopipeError) as caught:
        autopipe.compile(model, devices=3, chunks=CHUNKS)(**captioned(), return_loss=True)
    assert re.search(r"/modeling_clip\.py:\d+$", caught.value.source or "")
