"""Models to pipeline: real ones in small sizes, and small ones with one difficulty each.

Each entry of `MODELS` is a function that returns (model in training mode, function from a batch
size to (args, kwargs)). No weights are loaded; everything is random from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def _random(batch: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch)


def gpt2(layers: int = 2, dropout: float = 0.0) -> tuple[nn.Module, Inputs]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=32,
        n_head=2,
        vocab_size=64,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )

    def inputs(batch: int) -> Any:
        ids = torch.randint(0, 64, (batch, 16), generator=_random(batch))
        return (), {"input_ids": ids, "labels": ids}

    return GPT2LMHeadModel(config).train(), inputs


def gpt2_dropout() -> tuple[nn.Module, Inputs]:
    return gpt2(dropout=0.1)


def bert() -> tuple[nn.Module, Inputs]:
    """Padding, and labels of which the first chunk of one sample has none to count."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    def inputs(batch: int) -> Any:
        ids = torch.randint(0, 64, (batch, 12), generator=_random(batch))
        mask = torch.ones(batch, 12, dtype=torch.long)
        mask[::2, 9:] = 0
        labels = ids.clone()
        labels[:, 5:] = -100
        labels[0] = -100
        return (), {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return BertForMaskedLM(config).train(), inputs


def t5() -> tuple[nn.Module, Inputs]:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        num_layers=1,
        d_model=32,
        d_ff=64,
        num_heads=2,
        d_kv=16,
        vocab_size=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )

    def inputs(batch: int) -> Any:
        ids = torch.randint(0, 64, (batch, 12), generator=_random(batch))
        labels = torch.randint(0, 64, (batch, 8), generator=_random(batch + 100))
        return (), {"input_ids": ids, "labels": labels}

    return T5ForConditionalGeneration(config).train(), inputs


def resnet() -> tuple[nn.Module, Inputs]:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        layer_type="basic",
        num_labels=5,
    )

    def inputs(batch: int) -> Any:
        pixels = torch.randn(batch, 3, 64, 64, generator=_random(batch))
        labels = torch.randint(0, 5, (batch,), generator=_random(batch))
        return (), {"pixel_values": pixels, "labels": labels}

    return ResNetForImageClassification(config).train(), inputs


def unet() -> tuple[nn.Module, Inputs]:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )

    def inputs(batch: int) -> Any:
        sample = torch.randn(batch, 3, 16, 16, generator=_random(batch))
        return (sample, torch.randint(0, 100, (batch,), generator=_random(batch))), {}

    return model.train(), inputs


def transformer(dropout: float = 0.0) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model = nn.Transformer(32, 2, 1, 2, 64, dropout=dropout, batch_first=True)

    def inputs(batch: int) -> Any:
        source = torch.randn(batch, 6, 32, generator=_random(batch))
        return (source, torch.randn(batch, 5, 32, generator=_random(batch + 100))), {}

    return model.train(), inputs


def transformer_dropout() -> tuple[nn.Module, Inputs]:
    return transformer(dropout=0.1)


class FanOut(nn.Module):
    """One value that every later stage uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        shared = torch.tanh(self.layers[0](x))
        for layer in self.layers[1:]:
            x = torch.relu(layer(x)) + shared * shared
        return x


def fan_out() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    return FanOut(), lambda b: ((torch.randn(b, 16, generator=_random(b)),), {})


class TwoInputs(nn.Module):
    """Two inputs, the second first used late; nested results, one of them of a middle layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        middle = self.layers[1](torch.tanh(self.layers[0](x)))
        last = self.layers[3](torch.tanh(self.layers[2](middle) * scale))
        return {"last": last, "more": (middle, [x, last]), "scale": 2}


def two_inputs() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)

    def inputs(batch: int) -> Any:
        x = torch.randn(batch, 12, generator=_random(batch)).requires_grad_()
        return (x,), {"scale": torch.rand(batch, 1, generator=_random(batch)).requires_grad_()}

    return TwoInputs(), inputs


class Tied(nn.Module):
    """One weight for the first and the last layer, and once more in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x)) + self.embedding(ids + 1)
        return self.head(x)


def tied() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    return Tied(), lambda b: ((torch.randint(0, 19, (b, 5), generator=_random(b)),), {})


class IntegerBoundary(nn.Module):
    """Integers and booleans that are made early and used late; a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 10), nn.Linear(10, 10)
        self.table = nn.Embedding(10, 10)
        self.norm = nn.BatchNorm1d(10)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        best = x.argmax(-1)
        positive = x > 0
        x = torch.tanh(self.first(x))
        self.steps += 1
        x = torch.where(positive, self.last(x), x)
        x = torch.nn.functional.gelu(x)
        return x * self.table(best)


def integer_boundary() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    return IntegerBoundary(), lambda b: ((torch.randn(b, 10, generator=_random(b)),), {})


@dataclass(frozen=True)
class Entry:
    make: Callable[[], tuple[nn.Module, Inputs]]
    random: bool = False


MODELS = {
    "gpt2": Entry(gpt2),
    "bert": Entry(bert),
    "t5": Entry(t5),
    "resnet": Entry(resnet),
    "unet": Entry(unet),
    "transformer": Entry(transformer),
    "fan_out": Entry(fan_out),
    "two_inputs": Entry(two_inputs),
    "tied": Entry(tied),
    "integer_boundary": Entry(integer_boundary),
    "gpt2_dropout": Entry(gpt2_dropout, random=True),
    "transformer_dropout": Entry(transformer_dropout, random=True),
}
