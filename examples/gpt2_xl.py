"""GPT-2 XL's shape (1.5 billion parameters, 48 layers), to be planned without its weights.

autopipe plan examples/gpt2_xl.py:training --devices 8 --chunks 16 -o plan.json
autopipe report plan.json -o plan.html
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel


def training(batch: int = 32, length: int = 1024) -> tuple[nn.Module, dict[str, Any]]:
    """The model, as it returns its loss, and example inputs: token numbers of shape (B, length)."""
    config = GPT2Config(n_embd=1600, n_layer=48, n_head=25, use_cache=False)
    ids: Tensor = torch.zeros(batch, length, dtype=torch.long)
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}
