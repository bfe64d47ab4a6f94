"""Transformer-L of GPipe's Table 1 (arXiv 1811.06965, section 3), built without weights.

d 2048, feed-forward 8192, 32 heads, sequence 1024, vocabulary 32,000, no biases and no weights in
the norms: the paper counts 4d² + 2·d·8192 parameters a layer and two embeddings of 32,000·d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, INNER, HEADS, SEQUENCE, VOCABULARY = 2048, 8192, 32, 1024, 32_000


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and around a residual."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """`x`: (samples, positions, width); the same comes back."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self._qkv())
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))

    def _qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q, self.k, self.v


class TransformerL(nn.Module):
    """L layers between an embedding and a head; the result is the mean cross entropy."""

    def __init__(
        self,
        layers: int,
        width: int = WIDTH,
        inner: int = INNER,
        heads: int = HEADS,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, inner, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """`ids`, `labels`: (samples, positions), integers below the vocabulary."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def on_meta(layers: int, batch: int) -> tuple[TransformerL, tuple[Tensor, Tensor]]:
    """The model and a call's tensors without memory."""
    with torch.device("meta"):
        ids = torch.zeros(batch, SEQUENCE, dtype=torch.long)
        return TransformerL(layers), (ids, ids.clone())
