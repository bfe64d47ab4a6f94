"""Random programs of integers, masks and indices, and the truth about whether they mix samples.

A program works on tokens, in a row of all samples (``B * T``): integers, masks, floats of some
width. Many of its ops move tokens, and may move them between samples. The truth is eager torch: the
model on whole batches against the model on slices of them, for many batches of all kinds, with
parameters that are not zero.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

LENGTH, WIDTH, VOCABULARY = 4, 3, 12

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass
class Step:
    """An op: its name, the positions of its operands among the values of their kind, a number."""

    name: str
    operands: tuple[int, ...]
    number: int


@dataclass
class Mixer(nn.Module):
    """A random model of (ids, mask, x): (B, T), (B, T), (B, T, WIDTH)."""

    steps: list[Step] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)

    def __post_init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH).double()
        self.last = nn.Linear(WIDTH, WIDTH).double()
        self.source = nn.Parameter(torch.randn(200, WIDTH, dtype=torch.float64))
        self.gate = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, ids: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        values = {
            "i": [ids.flatten()],
            "b": [mask.flatten()],
            "h": [(self.table(ids) + x).flatten(0, 1)],
        }
        for step in self.steps:
            kinds, made, run = OPS[step.name]
            operands = [
                values[k][n % len(values[k])] for k, n in zip(kinds, step.operands, strict=True)
            ]
            values[made].append(run(self, step.number, *operands))
        return self.last(values["h"][-1].tanh()).view(*ids.shape, WIDTH)


def first_of_sample(tokens: Tensor) -> Tensor:
    """For each token, the place of its sample's first token."""
    return torch.arange(tokens.shape[0]) // LENGTH * LENGTH


def in_sample(tokens: Tensor) -> Tensor:
    return tokens.view(-1, LENGTH, *tokens.shape[1:])


OPS: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    # comparisons, some of them inert for most batches
    "is one": ("i", "b", lambda m, n, i: i == n),
    "below": ("i", "b", lambda m, n, i: i < n),
    "above": ("i", "b", lambda m, n, i: i >= n * 3),
    "high score": ("h", "b", lambda m, n, h: h.sum(-1) > n),
    "not": ("b", "b", lambda m, n, b: ~b),
    "and": ("bb", "b", lambda m, n, a, b: a & b),
    # integers
    "kind": ("i", "i", lambda m, n, i: i.abs() % (n % 4 + 2)),
    "count": ("b", "i", lambda m, n, b: b.long().cumsum(0)),
    "count in sample": ("b", "i", lambda m, n, b: in_sample(b).long().cumsum(1).flatten()),
    "best": ("h", "i", lambda m, n, h: h.argmax(-1)),
    "place": (
        "i",
        "i",
        lambda m, n, i: (
            nn.functional.one_hot(i.abs() % 3, 3).cumsum(0).gather(1, (i.abs() % 3)[:, None])[:, 0]
        ),
    ),
    "largest": ("i", "i", lambda m, n, i: i.max() - i),
    "order and back": (
        "i",
        "i",
        lambda m, n, i: i.argsort(stable=True).argsort() - first_of_sample(i),
    ),
    # floats
    "choose": ("bhh", "h", lambda m, n, b, g, h: torch.where(b[:, None], g, h)),
    "drop": ("bh", "h", lambda m, n, b, h: h * b[:, None]),
    "scale": ("ih", "h", lambda m, n, i, h: h * (i.abs() % 5 + 1)[:, None]),
    "sorted and back": (
        "ihi",
        "h",
        lambda m, n, i, h, j: (lambda order: (h[order] * (j[order] + 1)[:, None])[order.argsort()])(
            i.argsort(stable=True)
        ),
    ),
    "sorted": ("ih", "h", lambda m, n, i, h: h[i.argsort(stable=True)]),
    "gated sorted": ("ih", "h", lambda m, n, i, h: h + m.gate * h[i.argsort(stable=True)].sin()),
    "added back": (
        "ih",
        "h",
        lambda m, n, i, h: (lambda order: torch.zeros_like(h).index_add(0, order, h[order].sin()))(
            i.argsort(stable=True)
        ),
    ),
    "from own sample": (
        "ih",
        "h",
        lambda m, n, i, h: h[first_of_sample(i) + i.abs() % LENGTH],
    ),
    "from any": ("ih", "h", lambda m, n, i, h: h[(torch.arange(h.shape[0]) + i) % h.shape[0]]),
    "fill": (
        "bh",
        "h",
        lambda m, n, b, h: h.masked_scatter(b[:, None].expand_as(h), m.source),
    ),
    "looked up": ("i", "h", lambda m, n, i: m.source[i.clamp(0, 199)]),
    "turned": ("ih", "h", lambda m, n, i, h: torch.where((i == n)[:, None], h.flip(0), h)),
    "turned ids": ("i", "i", lambda m, n, i: i.roll(n % 3, 0)),
    "turned in sample": ("h", "h", lambda m, n, h: in_sample(h).roll(n, 1).flatten(0, 1)),
}
"""Name → kinds of operands, kind of result, what it does with the model, a number and operands."""


def random_mixer(seed: int) -> Mixer:
    """A model of two to five ops, of which the last gives floats."""
    drawn = random.Random(seed)
    names = [drawn.choice(sorted(OPS)) for _ in range(drawn.randint(1, 4))]
    names.append(drawn.choice([n for n in sorted(OPS) if OPS[n][1] == "h" and "i" in OPS[n][0]]))
    steps = []
    for name in names:
        latest = [-drawn.choice((1, 1, 1, 2)) for _ in OPS[name][0]]
        steps.append(Step(name, tuple(latest), drawn.randint(0, VOCABULARY - 1)))
    return Mixer(steps)


def batch(seed: int, size: int = 9) -> Batch:
    """An active batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
    if seed % 2:  # few different ones
        ids = torch.tensor([1, 5, seed % VOCABULARY])[ids % 3]
    mask = torch.rand(size, LENGTH, generator=generator) < 0.2 + seed % 4 * 0.2
    x = torch.randn(size, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    return ids, mask, x * (1 + seed % 5)


INERT: dict[str, Callable[[Batch], Batch]] = {
    "equal ids": lambda b: (torch.full_like(b[0], 7), b[1], b[2]),
    "no mask": lambda b: (b[0], torch.zeros_like(b[1]), b[2]),
    "full mask": lambda b: (b[0], torch.ones_like(b[1]), b[2]),
    "zeros": lambda b: (torch.zeros_like(b[0]), torch.zeros_like(b[1]), torch.zeros_like(b[2])),
    "copies": lambda b: (
        b[0][:1].expand_as(b[0]).clone(),
        b[1][:1].expand_as(b[1]).clone(),
        b[2][:1].expand_as(b[2]).clone(),
    ),
    "sorted ids": lambda b: (
        b[0].flatten().sort().values.view_as(b[0]),
        b[1].flatten().sort().values.view_as(b[1]),
        b[2],
    ),
    "active": lambda b: b,
}


@torch.no_grad()
def mixes(model: Mixer, tries: int = 24) -> bool:
    """Whether slices of some batch give another result than the whole, by eager torch."""
    gate = model.gate.clone()
    model.gate.fill_(0.7)
    try:
        for seed in range(tries):
            for size in (9, 30) if seed % 6 == 0 else (9,):
                given = batch(seed, size)
                whole = model(*given)
                parts = [model(*part) for part in zip(*(g.split(2) for g in given), strict=True)]
                if not torch.allclose(whole, torch.cat(parts), rtol=1e-9, atol=1e-9):
                    return True
    finally:
        model.gate.copy_(gate)
    return False
