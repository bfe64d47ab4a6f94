"""Adapters (PEFT): the model's own parameters are frozen, small ones beside them are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.support.zoo.decoders import DECODERS
from tests.support.zoo.entry import RATE, Entry


def lora(name: str, targets: list[str]) -> Callable[[bool], tuple[nn.Module, dict[str, Any]]]:
    """LoRA on the layers named `targets`. Its B matrices start at zero, which would leave A without
    a gradient, so all adapters get random values."""

    def build(dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
        from peft import LoraConfig, get_peft_model

        base, inputs = DECODERS[name].build(dropout)
        config = LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=targets,
            lora_dropout=RATE if dropout else 0.0,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            fan_in_fan_out=name == "GPT-2",
        )
        torch.manual_seed(2)
        return get_peft_model(base, config).train(), inputs

    return build


ADAPTERS = {
    "LoRA on GPT-2": Entry("Adapters", "PeftModelForCausalLM", lora("GPT-2", ["c_attn", "c_proj"])),
    "LoRA on Llama": Entry("Adapters", "PeftModelForCausalLM", lora("Llama", ["q_proj", "v_proj"])),
}
