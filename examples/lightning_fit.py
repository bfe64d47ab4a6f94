"""Train a GPT-2 with Lightning, as a two-stage pipeline.

    python examples/lightning_fit.py [--steps 20]

`Trainer(devices=1)`: Lightning starts one process, and the stages are CPU workers in it.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import autopipe

TEXT = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
SAMPLES = [{"input_ids": ids, "labels": ids} for ids in TEXT[:65536].long().view(-1, 64)]


class LanguageModel(lightning.LightningModule):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.body(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


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

    pipe = autopipe.compile(model, devices=2, chunks=4)
    module = LanguageModel(pipe.install())
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(SAMPLES, batch_size=16, shuffle=True))

    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
    print(f"stages: {len(pipe.stages)}")
    print(f"names of weights: {next(iter(module.state_dict()))}, ...")


if __name__ == "__main__":
    main()
