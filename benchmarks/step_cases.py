"""The models whose training steps are compared, each whole and as a chain of layers.

Autopipe and eager torch take the whole model; pipelines that are cut by hand take the chain. Both
have the same parameters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import transformer


@dataclass(frozen=True)
class Case:
    """A model to train.

    Attributes:
        model: ``model(x, target)`` returns the loss.
        layers: the same layers one after the other, of which the loss takes the last one's result.
        loss: of a result and its target; a mean over samples.
        x, target: one batch.
    """

    model: nn.Module
    layers: nn.Sequential
    loss: Callable[[Any, Tensor], Tensor]
    x: Tensor
    target: Tensor

    def splits(self, count: int = 3) -> list[int]:
        """Layers of the first of two stages, the best balanced first, by the time of each layer."""
        spent = [0.0] * len(self.layers)
        for _ in range(3):
            value = self.x
            for i, layer in enumerate(self.layers):
                value = value.detach()
                if value.is_floating_point():
                    value.requires_grad_()
                start = time.perf_counter()
                result = layer(value)
                last = i == len(spent) - 1
                end = self.loss(result, self.target) if last else result.sum()
                end.backward()
                spent[i] = time.perf_counter() - start  # of the last round
                value = result
        self.layers.zero_grad(set_to_none=True)
        whole = sum(spent)
        sums = dict(enumerate(accumulate(spent), 1))
        inner = [i for i in sums if i < len(spent)]
        return sorted(inner, key=lambda i: max(sums[i], whole - sums[i]))[:count]


def accumulation(case: Case, chunks: int) -> Callable[[], float]:
    """A step over the micro-batches one after the other; its seconds."""
    parts = list(zip(case.x.tensor_split(chunks), case.target.tensor_split(chunks), strict=True))

    def step() -> float:
        case.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        for x, target in parts:
            (case.model(x, target) * (len(x) / len(case.x))).backward()
        return time.perf_counter() - start

    return step


class WithLoss(nn.Module):
    """A model and its loss."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.model(x), target)


def token_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every token."""
    return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())


def transformer_case(layers: int = 8, width: int = 512, batch: int = 16) -> Case:
    """The pre-norm transformer of `benchmarks.models`, sequence 128, vocabulary 8192."""
    chain = transformer(layers, width)
    x, target = torch.randint(8192, (2, batch, 128)).unbind()
    return Case(WithLoss(chain, token_loss), chain, token_loss, x, target)


class Gpt2Embed(nn.Module):
    """The first layer of GPT-2's chain."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.wte, self.wpe = transformer.wte, transformer.wpe

    def forward(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))  # type: ignore[no-any-return]


class Gpt2Block(nn.Module):
    """A block of GPT-2's chain."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        return result if isinstance(result, Tensor) else result[0]


class Gpt2WithLabels(nn.Module):
    """Hugging Face's GPT-2, which computes its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.model(input_ids=x, labels=target).loss  # type: ignore[no-any-return]


def gpt2_case(layers: int = 12, width: int = 512, batch: int = 16) -> Case:
    """Hugging Face's GPT-2: 8 heads, sequence 128, vocabulary 8192, no dropout.

    Its head has a weight of its own: torchgpipe refuses one that two stages share, and under
    torch.distributed.pipelining the user would sum its gradients.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=8,
        vocab_size=8192,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        tie_word_embeddings=False,
        **dropout,
    )
    model = GPT2LMHeadModel(config).train()
    body = model.transformer
    blocks = [Gpt2Block(block) for block in body.h]
    chain = nn.Sequential(Gpt2Embed(body), *blocks, body.ln_f, model.lm_head)

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        return model.loss_function(scores, labels, vocab_size=8192)  # type: ignore[no-any-return]

    ids = torch.randint(8192, (batch, 128))
    return Case(Gpt2WithLabels(model), chain, loss, ids, ids.clone())


class Scale(nn.Module):
    """One elementwise operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def difference(result: Tensor, target: Tensor) -> Tensor:
    """A loss of two small operators."""
    return (result - target).mean()


def tiny_case(batch: int) -> Case:
    """Two stages with nothing to do."""
    chain = nn.Sequential(Scale(), Scale())
    torch.manual_seed(0)
    x, target = torch.randn(2, batch, 1).unbind()
    return Case(WithLoss(chain, difference), chain, difference, x, target)
