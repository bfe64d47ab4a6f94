"""The zoo at several lengths: one capture with numbers, one for all lengths after it.

Lengths are those of texts and sounds, the sizes of images, numbers of tokens. Values and gradients
are compared with eager torch as in `test_zoo`, for three lengths and for a smaller last batch.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import autopipe
from autopipe import program_cache
from tests.support.tiers import full_unless
from tests.support.zoo import TOLERANCE, ZOO, Entry
from tests.support.zoo.compare import CHUNKS, Step, compiled, step, taken

FACTORS = (1, 0.75, 1.25)
"""Lengths, relative to the zoo's. Shorter, so that tables of positions need not be longer."""

LAST = 5
"""Samples in the last batch."""

UNITS = {"pixel_values": 8, "sample": 4}
"""Images have a multiple of so many pixels; their patches are as large."""

RESIZED = {"ViT": {"interpolate_pos_encoding": True}}
"""What a model needs to take images of other sizes."""
RESIZED |= dict.fromkeys(("DeiT", "BEiT", "ViT-MAE"), RESIZED["ViT"])

ONE_SIZE: dict[str, str] = {
    "Swin": "must match the size",
    "ViT-MAE": "out of bounds|doesn't match model",
    "VideoMAE": "doesn't match model",
    "Audio Spectrogram Transformer": "must match the size",
    "CLIP": "doesn't match model",
}
"""Models that themselves only take inputs of one size, and what they say."""

FALLBACKS: dict[str, str] = {
    "Mamba": "turns it into a number",
    "RecurrentGemma": "attribute conv1d_state",
    "Longformer": "modeling_longformer.py",
    "MobileNetV2": "turns it into a number",
}
"""Models that are captured for each length, and a part of the reason: loops over time, chunks,
padding by the remainder, a state that each eager forward sets."""

SENSITIVE = ("Stable Diffusion 3",)
"""Models for which float32 gives eager gradients that are farther from those in float64 than
`TOLERANCE`: here the truth is that of float64."""

USUAL = ("BERT", "Llama", "T5", "Wav2Vec2")
"""Those that are compared unless ``ZOO_LENGTHS`` names others, separated by commas: the whole zoo
takes more than an hour."""

NAMES = os.environ["ZOO_LENGTHS"].split(",") if "ZOO_LENGTHS" in os.environ else USUAL

QUICK = ()


def dims(name: str, x: Tensor) -> tuple[int, ...]:
    """The dimensions of an input that are lengths."""
    if name in ("pixel_values", "sample") or (name == "hidden_states" and x.ndim == 4):
        return x.ndim - 2, x.ndim - 1
    if name in ("img_ids", "txt_ids"):
        return (0,)
    if name == "labels":
        return tuple(range(1, x.ndim))
    others = ("input_ids", "attention_mask", "bbox", "input_values", "hidden_states")
    return (1,) if name in (*others, "encoder_hidden_states") else ()


def at_length(inputs: dict[str, Any], factor: float) -> dict[str, Any]:
    """The inputs, repeated or cut to another length."""
    found = {}
    for name, x in inputs.items():
        image = name == "labels" and x.ndim == 3
        unit = UNITS.get(name, 8 if image else 4 if x.ndim == 4 else 1)
        for dim in dims(name, x):
            size = int(x.shape[dim] * factor) // unit * unit
            x = torch.cat([x] * -(-size // x.shape[dim]), dim).narrow(dim, 0, size).contiguous()
        found[name] = x
    return found


def unbatched(entry: Entry) -> set[str]:
    return set(entry.in_dims) if isinstance(entry.in_dims, dict) else set()


def part(entry: Entry, inputs: dict[str, Any], samples: Any) -> dict[str, Any]:
    """Some samples of a batch."""
    kept = unbatched(entry)
    return {
        n: x if n in kept or not isinstance(x, Tensor) else x[samples] for n, x in inputs.items()
    }


def eager(entry: Entry, model: nn.Module, inputs: dict[str, Any], batch: int) -> Step:
    """The truth: as `tests.support.zoo.compare.eager`, for a batch of any size."""
    model.zero_grad(set_to_none=True)
    if any(isinstance(m, _BatchNorm) for m in model.modules()):
        total = torch.zeros(())
        for chunk in torch.arange(batch).tensor_split(CHUNKS):
            loss = entry.loss(model(**part(entry, inputs, chunk))) * (len(chunk) / batch)
            loss.backward()
            total = total + loss.detach()
        found = total, taken(model)
    else:
        found = step(entry, model, inputs)
    model.zero_grad(set_to_none=True)
    return found


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per capture."""
    found: list[int] = []
    capture = program_cache.capture_with_costs

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return capture(*args, **kwargs)

    monkeypatch.setattr(program_cache, "capture_with_costs", counted)
    return found


def compare(entry: Entry, pipe: autopipe.Pipeline, inputs: dict[str, Any], batch: int) -> None:
    if any(entry is ZOO[name] for name in SENSITIVE):
        twice = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
        loss, expected = eager(entry, copy.deepcopy(pipe.model).double(), twice, batch)
    else:
        loss, expected = eager(entry, pipe.model, inputs, batch)
    found, gradients = step(entry, pipe, inputs)
    assert (found - loss).abs() <= TOLERANCE * loss.abs()
    scale = max(g.abs().max() for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        mine = gradients[name]
        assert (mine is None) == (gradient is None), name
        if mine is not None and gradient is not None:
            assert (mine - gradient).abs().max() <= TOLERANCE * scale, name


def each(names: Any) -> Any:
    params = [
        pytest.param(n, marks=[*full_unless(n in QUICK), pytest.mark.xdist_group(n)]) for n in names
    ]
    return pytest.mark.parametrize("name", params)


@each([n for n in NAMES if n not in ONE_SIZE])
def test_two_captures_serve_all_lengths(name: str, captures: list[int]) -> None:
    entry = ZOO[name]
    model, inputs = entry.build(False)
    pipe = compiled(entry, model)
    batch = len(next(x for n, x in inputs.items() if n not in unbatched(entry)))
    placed = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for factor in FACTORS:
            at = at_length(inputs, factor) | RESIZED.get(name, {})
            compare(entry, pipe, at, batch)
            placed.add(tuple(stage.parameters for stage in pipe.stages))
        compare(entry, pipe, part(entry, at, slice(LAST)), LAST)
        placed.add(tuple(stage.parameters for stage in pipe.stages))
    assert len(placed) == 1
    said = [str(w.message) for w in caught if "cannot be captured for any size" in str(w.message)]
    if name in FALLBACKS:
        assert FALLBACKS[name] in "\n".join((*said, str(autopipe.explain_captures(pipe))))
        assert len(captures) > 2
    else:
        assert said == []
        assert len(captures) == 2


@pytest.mark.full
@pytest.mark.parametrize("name", ONE_SIZE)
def test_models_of_one_size_say_so_themselves(name: str) -> None:
    model, inputs = ZOO[name].build(False)
    with pytest.raises((ValueError, RuntimeError), match=ONE_SIZE[name]):
        model(**at_length(inputs, 0.75))
