"""Train a GPT-2 in a loop of Accelerate, as a two-stage pipeline.

    python examples/accelerate_loop.py [--steps 20]

One process runs all stages, so start it with `python`, not with `accelerate launch`.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, default_collate
from transformers import GPT2Config, GPT2LMHeadModel

import autopipe

TEXT = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
SAMPLES = [{"input_ids": ids, "labels": ids} for ids in TEXT[:65536].long().view(-1, 64)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=64, n_head=4, n_positions=64, vocab_size=256, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(SAMPLES, batch_size=16, shuffle=True)

    # The capture now puts the parameters on the devices of their stages, before `install`.
    example = default_collate(SAMPLES[:16])
    pipe = autopipe.compile(model, devices=2, chunks=4, kwargs=example)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    # The stages are on their devices already, so Accelerate must not move the model.
    prepared = accelerator.prepare_model(pipe.install(), device_placement=False)
    optimizer, loader = accelerator.prepare(optimizer, loader)

    losses = []
    for step, batch in enumerate(loader):
        if step == steps:
            break
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"stages: {len(pipe.stages)}")
    print(f"unwrapped, it is the model: {accelerator.unwrap_model(prepared) is model}")


if __name__ == "__main__":
    main()
