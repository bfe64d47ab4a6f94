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
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import autopipe

LENGTH, BATCH = 64, 32
COMPARED = 5  # steps
TEXT = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)


def gpt2() -> nn.Module:
    """Six layers, five million parameters.

    Dropout is off only for the sake of the comparison at the end: a pipeline draws other random
    numbers than the plain model does.
    """
    torch.manual_seed(0)
    sizes = {"n_layer": 6, "n_embd": 256, "n_head": 4, "n_positions": LENGTH, "vocab_size": 256}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-4)


def batch(step: int) -> dict[str, Tensor]:
    """Pieces of the text, the same ones whenever a step is asked for again."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=generator).tolist()
    ids = torch.stack([TEXT[start : start + LENGTH] for start in starts]).long()
    return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The ordinary loop. Nothing in it knows whether `model` is a pipeline."""
    device = next(model.parameters()).device
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(steps):
        inputs = {name: x.to(device) for name, x in batch(step).items()}
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            speed = (step + 1) * BATCH * LENGTH / (time.perf_counter() - start)
            print(f"step {step:3}   loss {losses[-1]:.4f}   {speed:6.0f} tokens/s")
    return losses


def excerpt(code: str, name: str, lines: int) -> str:
    """The head of the function whose name starts so, and its last lines."""
    functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    found = next(node for node in functions if node.name.startswith(name))
    head, *body = code.splitlines()[found.lineno - 1 : found.end_lineno]
    dots = ["    ..."] if len(body) > lines else []
    return "\n".join([head, *dots, *body[-lines:]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 as a pipeline.")
    parser.add_argument("--devices", type=int, default=2, help="number of stages (2)")
    parser.add_argument("--chunks", type=int, default=4, help="micro-batches in a batch (4)")
    parser.add_argument("--steps", type=int, default=80, help="training steps (80)")
    parser.add_argument("--remat", default="full", help="full (default), none or min-cut")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()

    devices: int | list[str] = options.devices
    gpus = torch.cuda.device_count()
    if 0 < gpus < options.devices:  # a list may name a GPU several times
        devices = [f"cuda:{k * gpus // options.devices}" for k in range(options.devices)]
    elif gpus == 0:  # let each worker have its own share of the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.devices))

    model = gpt2()
    plain = copy.deepcopy(model)
    optimizer = optimizer_of(model)

    start = time.perf_counter()
    pipe = autopipe.compile(
        model, devices=devices, chunks=options.chunks, remat=options.remat, kwargs=batch(0)
    )
    print(f"== The plan, made in {time.perf_counter() - start:.1f} s: pipe.explain()\n")
    print(pipe.explain())

    last = len(pipe.stages) - 1
    print(f"\n== A piece of the program: pipe.code, {len(pipe.code.splitlines())} lines")
    print("   (AUTOPIPE_DUMP=folder in the environment writes this and every program before it)\n")
    for name, lines in (f"F_{last}_b", 6), (f"forward_{last}", 16), (f"device_{last}_forward", 8):
        print(excerpt(pipe.code, name, lines), end="\n\n")

    print("== Training the pipeline\n")
    losses = train(pipe, optimizer, options.steps)
    counted = enumerate(pipe.memory.stages)
    kept = ", ".join(f"stage {k} {s.peak / 2**20:.2f} MiB" for k, s in counted)
    print(f"\nkept from forward to backward, at most at once: {kept}")

    print("\n== Training the plain model from the same weights\n")
    plain.to(pipe.stages[0].device)
    expected = train(plain, optimizer_of(plain), min(COMPARED, options.steps))
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=False))
    print(f"\nlargest difference in the first {len(expected)} losses: {difference:.1e}")
    assert difference < 1e-4
    assert options.steps < 10 or losses[-1] < losses[0] / 1.5


if __name__ == "__main__":
    main()
