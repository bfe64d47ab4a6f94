"""An encoder-decoder with its loss inside: T5, on batches that do not divide.

    python examples/encoder_decoder.py

The encoder's result skips to every decoder layer, the labels are first used by the last stage, one
embedding serves encoder, decoder and head, and a batch of 10 is cut into chunks of 4, 3 and 3.
None of this needs a word from the user.
"""

from __future__ import annotations

import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

import autopipe

transformers.logging.set_verbosity_error()


def main() -> None:
    torch.manual_seed(0)
    config = T5Config(
        num_layers=3,
        d_model=64,
        d_ff=128,
        num_heads=4,
        d_kv=16,
        vocab_size=128,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pipe = autopipe.compile(model, devices=["cpu"] * 3, chunks=3)

    ids = torch.randint(1, 128, (10, 24))
    batch = {"input_ids": ids, "labels": ids.flip(1)[:, :12].contiguous()}
    batch["labels"][0, 4:] = -100  # nothing to count there

    loss = pipe(**batch).loss
    print(pipe.explain())
    plain = model(**batch).loss
    print(f"\nloss of the whole batch {loss:.6f}, of the plain model {plain:.6f}")
    assert abs(loss - plain) < 1e-5

    first = loss.item()
    for step in range(20):
        loss = pipe(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(f"step {step + 1:2}   loss {loss:.4f}")
    assert loss < first, "training lowers the loss"


if __name__ == "__main__":
    main()
