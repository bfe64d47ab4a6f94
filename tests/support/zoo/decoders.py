"""Language models that predict the next token."""

from __future__ import annotations

from typing import Any

from tests.support.zoo.entry import VOCABULARY, Entry, next_tokens, transformer

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    **SPECIAL,
}
GROUPED = {**WIDE, "num_key_value_heads": 2}
ROPE = ("attention_dropout",)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def causal(
    stem: str,
    sizes: dict[str, Any],
    rates: tuple[str, ...] = ROPE,
    *,
    head: str = "ForCausalLM",
    config: str = "Config",
) -> Entry:
    """A decoder-only model, whose classes start with `stem`."""
    return transformer("Decoders", stem + head, stem + config, sizes, rates, next_tokens)


PDROP = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": VOCABULARY}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
PHI = ("resid_pdrop", "embd_pdrop", "attention_dropout")
BOTH = ("hidden_dropout", "attention_dropout")
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

DECODERS = {
    "GPT-2": causal("GPT2", GPT, PDROP, head="LMHeadModel"),
    "GPT-Neo": causal(
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 16,
            **SPECIAL,
        },
        ("resid_dropout", "embed_dropout", "attention_dropout"),
    ),
    "GPT-NeoX": causal("GPTNeoX", WIDE, BOTH),
    "GPT-J": causal("GPTJ", {**GPT, "rotary_dim": 4}, PDROP),
    "Llama": causal("Llama", GROUPED),
    "Mistral": causal("Mistral", {**GROUPED, "sliding_window": 4}),
    "Qwen2": causal("Qwen2", GROUPED),
    "Qwen3": causal("Qwen3", {**GROUPED, "head_dim": 8}),
    "Gemma": causal("Gemma", {**GROUPED, "head_dim": 8}),
    "Gemma 2": causal("Gemma2", {**GROUPED, "head_dim": 8, **MIXED}),
    "Gemma 3": causal("Gemma3", {**GROUPED, "head_dim": 8, **MIXED}, config="TextConfig"),
    "Phi": causal("Phi", WIDE, PHI),
    "Phi-3": causal("Phi3", GROUPED, PHI),
    "Falcon": causal(
        "Falcon",
        {k: WIDE[k] for k in WIDE if k not in ("intermediate_size",)} | {"ffn_hidden_size": 48},
        BOTH,
    ),
    "OPT": causal(
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 16,
            **SPECIAL,
        },
        ("dropout", "attention_dropout"),
    ),
    "BLOOM": causal(
        "Bloom",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, **SPECIAL},
        BOTH,
    ),
    "OLMo-2": causal("Olmo2", GROUPED),
    "Mixtral": causal("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": causal(
        "Qwen2Moe",
        {**GROUPED, "num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS},
    ),
    "DeepSeek-V3": causal(
        "DeepseekV3",
        {
            **WIDE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            **EXPERTS,
        },
    ),
    "StarCoder2": causal(
        "Starcoder2", GROUPED, ("attention_dropout", "residual_dropout", "embedding_dropout")
    ),
    "RecurrentGemma": causal(
        "RecurrentGemma",
        {
            **{k: v for k, v in WIDE.items() if k != "max_position_embeddings"},
            "num_hidden_layers": 3,  # the third is the first with attention
            "lru_width": 32,
            "head_dim": 8,
            "attention_window_size": 4,
        },
        (),
    ),
    "Mamba": causal(
        "Mamba",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "vocab_size": VOCABULARY,
            "state_size": 4,
            **SPECIAL,
        },
        (),
    ),
}
