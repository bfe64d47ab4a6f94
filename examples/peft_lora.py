"""Train LoRA adapters of PEFT on a GPT-2, as a two-stage pipeline.

    python examples/peft_lora.py [--steps 20]

Frozen weights get no gradient and no optimizer state; the saved adapter is PEFT's own.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import autopipe

TEXT = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
BATCHES = TEXT[:65536].long().view(-1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=64, n_head=4, n_positions=64, vocab_size=256, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    base = GPT2LMHeadModel(config)
    untouched = copy.deepcopy(base)
    lora = LoraConfig(
        r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)

    pipe = autopipe.compile(model, devices=2, chunks=4)
    losses = []
    for ids in BATCHES[:steps]:
        loss = pipe(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"stages: {len(pipe.stages)}, trained tensors: {len(trained)}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(untouched, folder).eval()
    with torch.no_grad():
        again = loaded(input_ids=ids, labels=ids).loss.item()
        ours = pipe.eval()(input_ids=ids, labels=ids).loss.item()
    print(f"the saved adapter gives the same loss: {abs(again - ours) < 1e-5}")


if __name__ == "__main__":
    main()
