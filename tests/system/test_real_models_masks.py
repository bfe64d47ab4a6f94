"""Attention masks over padding, where a chunk's longest sequence is not the batch's.

Truth is eager torch on the whole batch, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.agreement import assert_close, fresh, pipelined
from tests.support.breakers import STAGES, crossing

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=3,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=40,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).double().train()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_embd=16,
        n_head=2,
        vocab_size=40,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).double().train()


def padded(lengths: list[int], side: str) -> dict[str, Tensor]:
    """Token numbers of sequences up to ten long, and which of them count."""
    places = torch.arange(10).expand(len(lengths), -1)
    ends = torch.tensor(lengths)[:, None]
    mask = (places < ends if side == "right" else places >= 10 - ends).long()
    ids = torch.randint(1, 40, mask.shape, generator=torch.Generator().manual_seed(len(lengths)))
    return {"input_ids": ids * mask, "attention_mask": mask}


def left(lengths: list[int]) -> dict[str, Tensor]:
    batch = padded(lengths, "left")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**batch, "position_ids": positions}


def class_loss(result: Any, batch: dict[str, Tensor]) -> Tensor:
    labels = torch.arange(len(batch["input_ids"])) % 3
    return F.cross_entropy(result.logits, labels)


def token_loss(result: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of tokens whose predecessor counts. (transformers' own computes in float32.)"""
    counts = batch["attention_mask"][:, :-1] == 1
    return F.cross_entropy(result.logits[:, :-1][counts], batch["input_ids"][:, 1:][counts])


MASKED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], Callable[..., Tensor]]] = {
    "bert": (bert, lambda lengths: padded(lengths, "right"), class_loss),
    "gpt2, padded on the left": (gpt2, left, token_loss),
}

BATCHES = [[10, 3, 7, 1, 10, 5, 8], [10] * 7, [4, 9]]
"""Lengths of the sequences: with padding; with none, so that the mask says nothing; few."""


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", MASKED)
def test_attention_masks_with_padding(name: str, first: int) -> None:
    """Whichever batch the model was captured with: transformers leaves masks out that have nothing
    to hide, and a capture must not. (Biases of keys have no gradient but rounding, so the scale is
    that of the model's largest.)"""
    make, inputs, loss = MASKED[name]
    model = make()
    twin = copy.deepcopy(model)
    pipe = pipelined(model, devices=STAGES, kwargs=inputs(BATCHES[first]))
    for lengths in BATCHES:
        batch, losses = inputs(lengths), []
        for module in (pipe, twin):
            module.zero_grad()
            losses.append(loss(module(**batch), batch))
            losses[-1].backward()
        assert_close(*losses)
        scale = max(p.grad.abs().max().item() for p in twin.parameters() if p.grad is not None)
        for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), key
            assert q.grad is None or (p.grad - q.grad).abs().max() <= 1e-12 * scale, key
    batched = [b for b, value in crossing(pipe) if value.dim() == 4]
    assert {k for b in batched for k in b.targets} == {1, 2}, "the mask crosses to later stages"


@pytest.mark.full
@pytest.mark.parametrize("name", MASKED)
def test_what_stands_in_the_padding_is_nobodys_business(name: str) -> None:
    make, inputs, loss = MASKED[name]
    pipe, batch = pipelined(make(), devices=STAGES), inputs(BATCHES[0])
    other = fresh(batch)
    other["input_ids"][batch["attention_mask"] == 0] = 39
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    assert_close(loss(pipe(**other), other), loss(pipe(**batch), batch))
