"""Every schedule gives GPipe's bits on architectures of the zoo, with their dropout.

Devices, micro-batches, samples and what is saved are drawn, for each case the same every time.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import nn

from autopipe.passes.schedule import schedule_for
from tests.support.early_schedules import EARLY, WithLoss, assert_same, step
from tests.support.zoo import ZOO

pytestmark = pytest.mark.usefixtures("alike_models_once", "each_stage_cut_alone")

NAMES = (
    *("GPT-2", "Llama", "Mistral", "Gemma 2", "Phi-3", "OPT", "BLOOM", "Mamba", "Mixtral"),
    *("BERT", "ALBERT", "DeBERTa-v2", "T5", "BART", "ViT", "ResNet", "Swin", "ConvNeXt"),
    *("Whisper", "UNet2D"),
)

REMAT: tuple[str | float, ...] = ("full", "none", "min-cut", 0.5)


@functools.cache
def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = ZOO[name].build(True)
    return WithLoss(model), inputs


PAIRS = [(n, kind) for i, n in enumerate(NAMES) for kind in EARLY[i % 2 :: 2]]
"""Of each model every other schedule: of the next one the others."""


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_model_of_the_zoo_trains_with_gpipes_bits(name: str, kind: str) -> None:
    model, inputs = built(name)
    draw = random.Random(f"{name} {kind}")
    K, M, samples = draw.randint(1, 4), draw.randint(1, 8), draw.choice([4, 7, 8])
    batch = (), {n: x[:samples] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    stages = schedule_for(kind, K).stages
    for remat in draw.sample(REMAT, 2):
        options = {"chunks": M, "remat": remat}
        expected = step(model, batch, devices=stages, **options)
        found = step(model, batch, devices=K, schedule=kind, **options)
        assert_same(found, expected)
