"""An encoder-decoder that computes its own loss, on batches that do not divide.

    python examples/encoder_decoder.py [--steps 40]

Hugging Face's T5, unmodified, with random weights, learns to spell words backward. Three stages:
the last ones use the encoder's result, the labels and an embedding that the first stage holds.
Batches have 32, 10 or 7 words for 4 micro-batches, and words differ in length, so that
micro-batches differ in the number of letters that count. The loss is still the whole batch's.
"""

from __future__ import annotations

import argparse
import copy
import re
from pydoc_data.topics import topics

import torch
import transformers
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import autopipe

CHUNKS, LENGTH, PAD, END, IGNORE = 4, 10, 0, 1, -100
WORDS = sorted(set(re.findall(rf"\b[a-z]{{3,{LENGTH - 1}}}\b", " ".join(topics.values()))))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        num_layers=2,
        d_model=64,
        d_ff=128,
        num_heads=4,
        d_kv=16,
        vocab_size=28,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
    )
    return T5ForConditionalGeneration(config).train()


def batch(step: int, size: int) -> dict[str, Tensor]:
    """Some words as numbers, padded; as labels the same words backward."""
    chosen = torch.randint(len(WORDS), (size,), generator=torch.Generator().manual_seed(step))
    words = [[ord(letter) - ord("a") + 2 for letter in WORDS[i]] for i in chosen.tolist()]
    ids = torch.tensor([[*w, END] + [PAD] * (LENGTH - len(w) - 1) for w in words])
    labels = [[*reversed(w), END] + [IGNORE] * (LENGTH - len(w) - 1) for w in words]
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "labels": torch.tensor(labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description="An encoder-decoder as a pipeline.")
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    transformers.logging.set_verbosity_error()

    model = t5()
    plain = copy.deepcopy(model)
    pipe = autopipe.compile(model, ["cpu"] * 3, CHUNKS, kwargs=batch(0, 32))
    print(pipe.explain())

    print("\n== What stages share\n")
    for stage in pipe.stages:
        for boundary in stage.inputs:
            if boundary.source is None or len(boundary.targets) > 1 or boundary.kind == "parameter":
                print(f"stage {stage.index} receives  {boundary}")
    takers = {b.name: b.targets for stage in pipe.stages for b in stage.inputs}
    assert takers["labels"][-1] == 2, "the last stage computes the loss"

    print("\n== Ten words in four micro-batches: the loss is still the batch's\n")
    inputs = batch(1, 10)
    loss, expected = pipe(**inputs).loss, plain(**inputs).loss
    chunks = [{k: x.tensor_split(CHUNKS)[m] for k, x in inputs.items()} for m in range(CHUNKS)]
    counts = [int(chunk["labels"].ne(IGNORE).sum()) for chunk in chunks]
    means = torch.stack([plain(**chunk).loss.detach() for chunk in chunks])
    print(f"words in micro-batches {[len(c['labels']) for c in chunks]}, letters {counts}")
    print(
        f"pipeline {loss:.6f}   model {expected:.6f}   mean of the parts' means {means.mean():.6f}"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (means.mean() - expected).abs() > (loss - expected).abs()
    loss.backward()
    expected.backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
    largest = max(q.abs().max().item() for _, q in pairs)
    difference = max((p - q).abs().max().item() for p, q in pairs)
    print(f"largest gradient {largest:.3f}, largest difference {difference:.1e}")
    assert difference <= 1e-5 * largest

    print("\n== Training\n")
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = pipe(**batch(step, (32, 32, 10, 7)[step % 4])).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:2}   loss {loss.item():.4f}")
    assert steps < 2 or losses[-1] < losses[0]


if __name__ == "__main__":
    main()
