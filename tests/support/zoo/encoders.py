"""Text encoders, and encoder-decoders of text and of speech."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.zoo.decoders import SPECIAL
from tests.support.zoo.entry import (
    BATCH,
    CLASSES,
    VOCABULARY,
    Entry,
    WayOut,
    classified_text,
    ids,
    make,
    masked_tokens,
    padding,
    transformer,
    translated,
)

WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
}
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def guesses(stem: str, sizes: dict[str, Any], rates: tuple[str, ...] = RATES) -> Entry:
    """An encoder that guesses masked tokens."""
    return transformer(
        "Encoders", f"{stem}ForMaskedLM", f"{stem}Config", sizes, rates, masked_tokens
    )


def classifies(
    stem: str, sizes: dict[str, Any], rates: tuple[str, ...] = RATES, **more: Any
) -> Entry:
    """An encoder that classifies texts."""
    model = f"{stem}ForSequenceClassification"
    return transformer("Encoders", model, f"{stem}Config", sizes, rates, classified_text, **more)


DEBERTA = {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DEBERTA_RATES = (*RATES, "pooler_dropout")


LONGFORMER = make(
    "LongformerForMaskedLM",
    "LongformerConfig",
    {**WIDE, "attention_window": 4, "pad_token_id": 0},
    RATES,
    masked_tokens,
)


def local_longformer(dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Longformer looks whether any token of the batch wants global attention; here none does."""
    model, inputs = LONGFORMER(dropout)
    for layer in model.longformer.encoder.layer:
        layer.register_forward_pre_hook(local, with_kwargs=True)
    return model, inputs


def local(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"is_global_attn": False}


def scanned() -> dict[str, Tensor]:
    """Texts of which some tokens are to be guessed, and where on the page they stand."""
    batch = masked_tokens()
    corner = torch.randint(0, 40, (*batch["input_ids"].shape, 2))
    return batch | {"bbox": torch.cat([corner, corner + torch.randint(1, 20, corner.shape)], -1)}


ENCODERS = {
    "BERT": guesses("Bert", WIDE),
    "RoBERTa": classifies("Roberta", {**WIDE, "pad_token_id": 0}),
    "DistilBERT": classifies(
        "DistilBert",
        {
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32,
            "num_labels": CLASSES,
        },
        ("dropout", "attention_dropout", "seq_classif_dropout"),
    ),
    "ALBERT": guesses("Albert", {**WIDE, "embedding_size": 16}),
    "ELECTRA": classifies("Electra", {**WIDE, "embedding_size": 16}),
    "DeBERTa-v2": classifies(
        "DebertaV2",
        {**DEBERTA, "problem_type": "single_label_classification"},
        DEBERTA_RATES,
        ways_out=(
            WayOut(
                'problem_type="single_label_classification"',
                make(
                    "DebertaV2ForSequenceClassification",
                    "DebertaV2Config",
                    DEBERTA,
                    DEBERTA_RATES,
                    classified_text,
                ),
                "problem_type",
            ),
        ),
    ),
    "MPNet": guesses("MPNet", WIDE),
    "FNet": guesses(
        "FNet", {k: v for k, v in WIDE.items() if k != "num_attention_heads"}, RATES[:1]
    ),
    "ModernBERT": guesses(
        "ModernBert",
        {**WIDE, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
        ("attention_dropout", "embedding_dropout", "mlp_dropout"),
    ),
    "XLNet": classifies(
        "XLNet",
        {
            "d_model": 32,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 48,
            "vocab_size": VOCABULARY,
            "num_labels": CLASSES,
        },
        ("dropout", "summary_last_dropout"),
    ),
    "LayoutLM": transformer(
        "Encoders",
        "LayoutLMForMaskedLM",
        "LayoutLMConfig",
        {**WIDE, "max_2d_position_embeddings": 64},
        RATES,
        scanned,
    ),
    "Longformer": Entry(
        "Encoders",
        "LongformerForMaskedLM",
        local_longformer,
        ways_out=(
            WayOut(
                "a forward pre-hook on each layer that gives it `is_global_attn=False`",
                LONGFORMER,
                "pass the decision in as a Python value",
            ),
        ),
    ),
}

SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    **SPECIAL,
}
DROPOUT = ("dropout", "attention_dropout", "activation_dropout")
NO_LAYERDROP = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


def speech_and_text() -> dict[str, Tensor]:
    """Spectrograms and what is said."""
    labels = ids(9).masked_fill(padding(9) == 0, -100)
    return {"input_features": torch.randn(BATCH, 8, 32), "labels": labels}


def translates(
    stem: str, sizes: dict[str, Any], rates: tuple[str, ...] = DROPOUT, **more: Any
) -> Entry:
    """An encoder and a decoder, which attends to it."""
    model = f"{stem}ForConditionalGeneration"
    inputs = more.pop("inputs", translated)
    return transformer("Encoder-decoders", model, f"{stem}Config", sizes, rates, inputs, **more)


ENCODER_DECODERS = {
    "T5": translates(
        "T5",
        {
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "decoder_start_token_id": 0,
        },
        ("dropout_rate",),
    ),
    "BART": translates("Bart", SEQ2SEQ),
    "Pegasus": translates("Pegasus", SEQ2SEQ),
    "M2M-100": translates(
        "M2M100",
        {**SEQ2SEQ, **NO_LAYERDROP},
        ways_out=(
            WayOut(
                "encoder_layerdrop=0, decoder_layerdrop=0",
                make(
                    "M2M100ForConditionalGeneration",
                    "M2M100Config",
                    SEQ2SEQ,  # 0.05 each, if one says nothing
                    DROPOUT,
                    translated,
                ),
                "layerdrop",
            ),
        ),
    ),
    "Whisper": translates(
        "Whisper",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        inputs=speech_and_text,
    ),
}
