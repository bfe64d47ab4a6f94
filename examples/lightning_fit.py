"""Train a GPT-2 with Lightning, as a two-stage pipeline.

    python examples/lightning_fit.py [--steps 20]

Lightning starts one process, and all stages are in it. It would move the model, and the state of
an optimizer that it loads, to one device; the strategy `InStages` leaves both where they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pydoc_data.topics import topics
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from transformers import GPT2Config, GPT2LMHeadModel

import autopipe

TEXT = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
SAMPLES = [{"input_ids": ids, "labels": ids} for ids in TEXT[:65536].long().view(-1, 64)]


class InStages(SingleDeviceStrategy):
    """The pipeline has placed the parameters."""

    def model_to_device(self) -> None:
        pass

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)


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

    # The capture now puts the parameters on the devices of their stages, before `install`.
    example = default_collate(SAMPLES[:16])
    pipe = autopipe.compile(model, devices=2, chunks=4, kwargs=example)
    module = LanguageModel(pipe.install())
    trainer = lightning.Trainer(
        strategy=InStages("cuda:0" if torch.cuda.is_available() else "cpu"),
        accelerator="auto",
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
