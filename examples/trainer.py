"""Train a GPT-2 with the Trainer of transformers, as a two-stage pipeline.

    python examples/trainer.py [--steps 20]

`pipe.install()` returns the model itself, whose calls then run the pipeline. The Trainer sees a
`PreTrainedModel`: its checkpoints are the model's own.
"""

from __future__ import annotations

import argparse
import tempfile
from pydoc_data.topics import topics

import torch
from torch.utils.data import default_collate
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import autopipe

TEXT = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
SAMPLES = [{"input_ids": ids, "labels": ids} for ids in TEXT[:16384].long().view(-1, 64)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=64, n_head=4, n_positions=64, vocab_size=256, bos_token_id=0,
        eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)

    # The call that the Trainer makes. The capture now puts the parameters on the devices of their
    # stages, before the Trainer loads the state of an optimizer.
    example = default_collate(SAMPLES[:16]) | {"num_items_in_batch": torch.tensor(16.0)}
    pipe = autopipe.compile(model, devices=2, chunks=4, kwargs=example)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=pipe.install(),
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=SAMPLES,
        )
        trainer.train()
        trainer.save_model(folder)
        loaded = GPT2LMHeadModel.from_pretrained(folder)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")
    print(f"stages: {len(pipe.stages)}")
    equal = all(
        torch.equal(a.cpu(), b)
        for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
    )
    print(f"the saved model has the trained weights: {equal}")


if __name__ == "__main__":
    main()
