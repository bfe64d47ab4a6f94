"""Speech, and images with text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.zoo.entry import (
    BATCH,
    CLASSES,
    IMAGE,
    RATE,
    SPREAD,
    VOCABULARY,
    Entry,
    WayOut,
    make,
    text,
    training,
    transformer,
)

SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 32,
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "num_labels": CLASSES,
}
RATES = (
    "hidden_dropout",
    "activation_dropout",
    "attention_dropout",
    "feat_proj_dropout",
    "final_dropout",
)
NO_LAYERDROP = {"layerdrop": 0.0}
NO_AUGMENT = {"apply_spec_augment": False}


def speech() -> dict[str, Tensor]:
    """Sounds of different lengths with a class each."""
    lengths = torch.tensor([400, 320, 400, 280, 400, 360, 240, 400])
    mask = (torch.arange(400) < lengths[:, None]).long()
    labels = torch.randint(0, CLASSES, (BATCH,))
    return {"input_values": torch.randn(BATCH, 400), "attention_mask": mask, "labels": labels}


def spectrograms() -> dict[str, Tensor]:
    """Sounds as spectrograms, with a class each."""
    labels = torch.randint(0, CLASSES, (BATCH,))
    return {"input_values": torch.randn(BATCH, 32, 16), "labels": labels}


def hears(stem: str) -> Entry:
    """A classifier of sounds."""
    model, config = f"{stem}ForSequenceClassification", f"{stem}Config"

    ways_out = (
        WayOut(
            "layerdrop=0", make(model, config, {**SPEECH, **NO_AUGMENT}, RATES, speech), "layerdrop"
        ),
        WayOut(
            "apply_spec_augment=False",
            make(model, config, {**SPEECH, **NO_LAYERDROP}, RATES, speech),
            "apply_spec_augment",
        ),
    )
    sizes = {**SPEECH, **NO_LAYERDROP, **NO_AUGMENT}
    return transformer("Speech", model, config, sizes, RATES, speech, ways_out=ways_out)


def clip_sizes(dropout: bool) -> Any:
    from transformers import CLIPConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_dropout": RATE if dropout else 0.0,
        "initializer_range": SPREAD,
    }
    return CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 79,
        },
        vision_config={**sizes, "image_size": IMAGE, "patch_size": 8},
        projection_dim=16,
    )


def captioned() -> dict[str, Tensor]:
    """Pictures and what they show; each text ends with the token that CLIP looks for."""
    torch.manual_seed(1)
    batch: dict[str, Tensor] = dict(text())
    ends = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(BATCH), ends] = 79
    return batch | {"pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE)}


def clip(dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPModel

    return training(CLIPModel(clip_sizes(dropout))), captioned()


class Embeddings(nn.Module):
    """What CLIP computes of one sample at a time, and its temperature. It compares all texts of a
    batch with all its images: that is for the whole batch, after the pipeline."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = self.clip(**inputs)
        return result.text_embeds, result.image_embeds, self.clip.logit_scale.exp()


def embeddings(dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = clip(dropout)
    return Embeddings(model), inputs


def contrastive(result: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """CLIP's loss: each text finds its image and each image its text."""
    texts, images, scale = result
    similarity = texts @ images.T * scale
    found = torch.arange(len(similarity))
    return (F.cross_entropy(similarity, found) + F.cross_entropy(similarity.T, found)) / 2


SPEECH_AND_MORE = {
    "Wav2Vec2": hears("Wav2Vec2"),
    "HuBERT": hears("Hubert"),
    "Audio Spectrogram Transformer": transformer(
        "Speech",
        "ASTForAudioClassification",
        "ASTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_length": 32,
            "num_mel_bins": 16,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "num_labels": CLASSES,
        },
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        spectrograms,
    ),
    "CLIP": Entry(
        "Images with text",
        "CLIPModel",
        embeddings,
        contrastive,
        ways_out=(WayOut("return the embeddings, compare them outside", clip, "finish outside"),),
    ),
}
