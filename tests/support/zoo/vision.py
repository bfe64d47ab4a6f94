"""Image classifiers: transformers and convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.zoo.entry import BATCH, CLASSES, IMAGE, Entry, images, transformer

PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_labels": CLASSES,
}
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")
PATH = ("drop_path_rate",)
LABELS = {"num_labels": CLASSES}


def sees(stem: str, sizes: dict[str, Any], rates: tuple[str, ...], **more: Any) -> Entry:
    """A classifier of images."""
    model = f"{stem}ForImageClassification"
    return transformer("Vision", model, f"{stem}Config", sizes, rates, images, **more)


SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
    **LABELS,
}
SEGFORMER_RATES = (*RATES, *PATH, "classifier_dropout_prob")


def segmented() -> dict[str, Tensor]:
    """Pictures with a class for each pixel."""
    return images() | {"labels": torch.randint(0, CLASSES, (BATCH, IMAGE, IMAGE))}


def masked_patches() -> dict[str, Tensor]:
    """Pictures; numbers whose order says which patches are hidden, which the model draws itself if
    one gives none."""
    return {"pixel_values": images()["pixel_values"], "noise": torch.rand(BATCH, 16)}


def films() -> dict[str, Tensor]:
    """Four pictures each, with a class."""
    labels = torch.randint(0, CLASSES, (BATCH,))
    return {"pixel_values": torch.randn(BATCH, 4, 3, IMAGE, IMAGE), "labels": labels}


VISION = {
    "ViT": sees("ViT", PATCHES, RATES),
    "DeiT": sees("DeiT", PATCHES, RATES),
    "BEiT": sees("Beit", PATCHES, RATES + PATH),
    "Swin": sees(
        "Swin",
        {
            "image_size": IMAGE,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            **LABELS,
        },
        RATES + PATH,
    ),
    "ConvNeXt": sees(
        "ConvNext",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 2],
            "num_stages": 2,
            "layer_scale_init_value": 0.1,
            **LABELS,
        },
        PATH,
    ),
    "ResNet": sees(
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], **LABELS},
        (),
    ),
    "RegNet": sees(
        "RegNet",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 2],
            "groups_width": 16,
            "layer_type": "y",
            **LABELS,
        },
        (),
    ),
    "EfficientNet": sees(
        "EfficientNet",
        {
            "image_size": IMAGE,
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 40],
            "kernel_sizes": [3, 3, 5],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 1],
            "expand_ratios": [1, 6, 6],
            "depthwise_padding": [],
            "hidden_dim": 320,
            **LABELS,
        },
        ("dropout_rate", "drop_connect_rate"),
    ),
    "MobileNetV2": sees(
        "MobileNetV2",
        {"image_size": IMAGE, "depth_multiplier": 0.25, "output_stride": 8, **LABELS},
        ("classifier_dropout_prob",),
    ),
    "DINOv2": sees(
        "Dinov2",
        {k: v for k, v in PATCHES.items() if k != "intermediate_size"} | {"mlp_ratio": 2},
        RATES + PATH,
    ),
    "SegFormer": sees("Segformer", SEGFORMER, SEGFORMER_RATES),
    "SegFormer segments": transformer(
        "Vision",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        SEGFORMER,
        SEGFORMER_RATES,
        segmented,
    ),
    "ViT-MAE": transformer(
        "Vision",
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {
            **PATCHES,
            "decoder_num_attention_heads": 4,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 48,
        },
        RATES,
        masked_patches,
    ),
    "VideoMAE": transformer(
        "Vision",
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        {**PATCHES, "num_frames": 4, "tubelet_size": 2},
        RATES,
        films,
    ),
}
