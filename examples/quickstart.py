"""Train an unmodified Hugging Face GPT-2 as a pipeline, in the ordinary loop.

    python examples/quickstart.py [--devices 2] [--chunks 4] [--steps 80] [--remat full]

The text is the documentation that ships with Python; a token is a byte; the weights are random.
Nothing is downloaded. Stages run on the GPUs that are here, or on CPU workers.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import time
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import autopipe

LENGTH, BATCH, COMPARED = 128, 16, 5
TEXT = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)


def gpt2() -> GPT2LMHeadModel:
    """Six layers, 4.8 million parameters. (Dropout is off for the comparison at the end: the plain
    model draws other random numbers.)"""
    config = GPT2Config(
        n_layer=6,
        n_embd=256,
        n_head=4,
        vocab_size=256,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def batch(step: int) -> dict[str, Tensor]:
    """The same pieces of the text every time that a step is run."""
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    ids = torch.stack([TEXT[s : s + LENGTH] for s in starts]).long()
    return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The ordinary loop: it does not know whether `model` is a pipeline."""
    device = next(model.parameters()).device
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        loss = model(**{name: x.to(device) for name, x in batch(step).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            speed = (step + 1) * BATCH * LENGTH / (time.perf_counter() - start)
            print(f"step {step:3}   loss {losses[-1]:.3f}   {speed:6.0f} tokens/s")
    return losses


def excerpt(code: str, name: str, lines: int) -> str:
    """The end of one function of the generated program."""
    tree = ast.parse(code)
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith(name))
    body = code.splitlines()[found.lineno : found.end_lineno]
    cut = ["    ..."] if len(body) > lines else []
    return "\n".join([code.splitlines()[found.lineno - 1], *cut, *body[-lines:]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 as a pipeline.")
    parser.add_argument("--devices", type=int, default=2, help="how many stages (default 2)")
    parser.add_argument("--chunks", type=int, default=4, help="micro-batches in a batch (default 4)")
    parser.add_argument("--steps", type=int, default=80, help="steps to train (default 80)")
    parser.add_argument("--remat", default="full", help="full (default), none or min-cut")
    args = parser.parse_args()

    devices: int | list[str] = args.devices
    gpus = torch.cuda.device_count()
    if 0 < gpus < args.devices:  # a list may name a GPU several times
        devices = [f"cuda:{k * gpus // args.devices}" for k in range(args.devices)]
    if gpus == 0:  # one worker per stage: let each have its share of the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.devices))

    model = gpt2()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    start = time.perf_counter()
    pipe = autopipe.compile(
        model, devices=devices, chunks=args.chunks, remat=args.remat, kwargs=batch(0)
    )
    print(f"== the plan ({time.perf_counter() - start:.1f} s to compile): print(pipe.explain())\n")
    print(pipe.explain())

    last = len(pipe.stages) - 1
    print(f"\n== the program, of which this is a piece: pipe.code, {pipe.code.count(chr(10))} lines")
    print("   (every intermediate program: AUTOPIPE_DUMP=dir python examples/quickstart.py)\n")
    for name, lines in ((f"F_{last}_b", 6), (f"forward_{last}", 12), (f"device_{last}_forward", 8)):
        print(excerpt(pipe.code, name, lines), end="\n\n")

    print("== training: loss.backward(), optimizer.step()\n")
    losses = train(pipe, optimizer, args.steps)
    print("\nbytes kept from forward to backward, at most at once:")
    for k, stage in enumerate(pipe.memory.stages):
        print(f"  stage {k}: {stage.peak:,}")

    print("\n== the plain model from the same weights\n")
    plain.to(pipe.stages[0].device)
    steps = min(COMPARED, args.steps)
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), steps)
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=False))
    print(f"\nlargest difference in the first {steps} losses: {difference:.1e}")
    assert difference < 1e-4, "the pipeline and the plain model disagree"


if __name__ == "__main__":
    main()
