"""The models that are measured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def gpt2(
    layers: int, width: int, heads: int, sequence: int, vocabulary: int = 256
) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    """Hugging Face's GPT-2 with random weights and no dropout; and its inputs by batch size."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        n_positions=sequence,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )

    def inputs(batch: int) -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, (batch, sequence))
        return {"input_ids": ids, "labels": ids.clone()}

    return GPT2LMHeadModel(config).train(), inputs


Calls = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
"""Batch size → args, kwargs."""


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Embed(nn.Module):
    """Tokens and positions."""

    def __init__(self, vocabulary: int, width: int, sequence: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(sequence, width) * 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions


def transformer(
    layers: int = 8, width: int = 512, sequence: int = 128, vocabulary: int = 8192
) -> nn.Sequential:
    """The transformer of the two-core comparison, a Sequential so that torchgpipe can take it."""
    torch.manual_seed(0)
    return nn.Sequential(
        Embed(vocabulary, width, sequence),
        *(Block(width, width // 64) for _ in range(layers)),
        nn.LayerNorm(width),
        nn.Linear(width, vocabulary, bias=False),
    )


def t5(layers: int = 3, width: int = 256) -> tuple[nn.Module, Calls]:
    """Hugging Face's T5 with random weights and no dropout; and its inputs by batch size."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        num_layers=layers,
        d_model=width,
        d_ff=4 * width,
        num_heads=width // 64,
        d_kv=64,
        vocab_size=4096,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )

    def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = torch.randint(0, 4096, (batch, 128))
        return (), {"input_ids": ids, "labels": torch.randint(0, 4096, (batch, 64))}

    return T5ForConditionalGeneration(config).train(), inputs


def unet(size: int = 32, width: int = 32) -> tuple[nn.Module, Calls]:
    """Diffusers' UNet2D with random weights; and its inputs by batch size."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=size,
        layers_per_block=1,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )

    def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))), {}

    return model.train(), inputs


def swin(size: int = 64, width: int = 48) -> tuple[nn.Module, Calls]:
    """Hugging Face's Swin with random weights, no dropout; and its inputs by batch size."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=size,
        patch_size=2,
        embed_dim=width,
        depths=[2, 2, 4],
        num_heads=[3, 6, 12],
        window_size=4,
        num_labels=10,
        drop_path_rate=0.0,
    )

    def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        pixels = torch.randn(batch, 3, size, size)
        return (), {"pixel_values": pixels, "labels": torch.randint(0, 10, (batch,))}

    return SwinForImageClassification(config).train(), inputs


class Bottleneck(nn.Module):
    """A block of ResNet-50 (He et al. 2015): 1×1, 3×3, 1×1, and what was added."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


class ResNet(nn.Module):
    """ResNet-50's shape by default; returns the loss."""

    def __init__(
        self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),
        ]
        inputs = width
        for i, count in enumerate(blocks):
            for j in range(count):
                layers.append(Bottleneck(inputs, width << i, 2 if i and not j else 1))
                inputs = 4 * width << i
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.layers(images), labels)
