"""A U-Net as a pipeline: its skips go straight from the stage that makes them to the one that
uses them, however many stages lie between.

    python examples/unet_skips.py [--steps 12]

The model is diffusers' UNet2DModel, unmodified, with random weights; it learns to remove noise
from pictures of discs.
"""

from __future__ import annotations

import argparse
import copy

import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn import functional as F

import autopipe

SIZE, BATCH, STAGES, CHUNKS = 32, 8, 4, 4


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    ).train()


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy discs of random place and radius, the time step of each, and the noise."""
    generator = torch.Generator().manual_seed(step)
    axis = torch.linspace(-1, 1, SIZE)
    x, y, radius = torch.rand(3, BATCH, 1, 1, generator=generator) - 0.5
    inside = (axis - x) ** 2 + (axis[:, None] - y) ** 2 < (0.3 + 0.4 * radius) ** 2
    clean = inside[:, None].float() * 2 - 1
    noise = torch.randn(clean.shape, generator=generator)
    time = torch.randint(1000, (BATCH,), generator=generator)
    weight = (time / 1000)[:, None, None, None]
    return (1 - weight).sqrt() * clean + weight.sqrt() * noise, time, noise


def main() -> None:
    parser = argparse.ArgumentParser(description="A U-Net as a pipeline.")
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps

    model = unet()
    plain = copy.deepcopy(model)
    noisy, time, noise = batch(0)
    pipe = autopipe.compile(model, ["cpu"] * STAGES, CHUNKS, args=(noisy, time))
    print(pipe.explain())

    print("\n== Values that skip stages\n")
    sent = [b for stage in pipe.stages for b in stage.outputs]
    skips = [b for b in sent if max(b.targets, default=0) - (b.source or 0) > 1]
    for b in skips:
        between = set(range(b.source or 0, max(b.targets))) - {b.source, *b.targets}
        print(f"{b}" + (f"   (not through {sorted(between)})" if between else ""))
        for k in between:
            assert b.name not in [received.name for received in pipe.stages[k].inputs]
    assert skips

    print("\n== The same gradients as the model's own, run over the same micro-batches in turn\n")
    F.mse_loss(pipe(noisy, time).sample, noise).backward()
    for x, t, target in zip(*(y.tensor_split(CHUNKS) for y in (noisy, time, noise)), strict=True):
        (F.mse_loss(plain(x, t).sample, target) * len(x) / BATCH).backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
    largest = max(q.abs().max().item() for _, q in pairs)
    difference = max((p - q).abs().max().item() for p, q in pairs)
    print(f"largest gradient {largest:.3f}, largest difference {difference:.1e}")
    assert difference <= 2e-6 * largest

    print("\n== Training\n")
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        noisy, time, noise = batch(step)
        optimizer.zero_grad()
        loss = F.mse_loss(pipe(noisy, time).sample, noise)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step:2}   loss {loss.item():.4f}")
    assert steps < 2 or losses[-1] < losses[0]


if __name__ == "__main__":
    main()
