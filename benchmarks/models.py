"""The models that are measured."""

from __future__ import annotations

import logging
from collections.abc import Callable

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
