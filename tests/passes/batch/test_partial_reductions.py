"""What each sample adds to a value by index: counts per expert, sums per group, histograms.

Truth is eager torch on the whole batch; seven samples in three uneven micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.errors import CouplingError
from tests.support.agreement import assert_agrees, pipelined

C = 6
BATCH = 7
GROUPS = 4


pytestmark = [pytest.mark.few(3), pytest.mark.usefixtures("double", "traces_once")]


class Model(nn.Module):
    """``f(model, h, g)``: `h` (B, C) of the samples and their groups `g` (B,)."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(C, C)
        self.start = nn.Parameter(torch.randn(GROUPS, C))
        self.register_buffer("counts", torch.arange(GROUPS))
        self.f = f

    def forward(self, x: Tensor) -> Any:
        h = self.layer(x).tanh()
        return self.f(self, h, x[:, 0].abs().mul(10).long() % GROUPS)


def batch(size: int = BATCH) -> Tensor:
    return torch.randn(size, C).requires_grad_()


def rows(g: Tensor) -> Tensor:
    return g[:, None].expand(-1, C)


def zeros() -> Tensor:
    return torch.zeros(GROUPS, C)


def tokens(s: Any, h: Tensor, g: Tensor) -> Tensor:
    """Several tokens of a sample, each to two experts."""
    scores = h.view(-1, 3, 2).matmul(s.start[:2, :GROUPS]).softmax(-1).flatten(0, 1)
    picked = scores.topk(2, -1)[1].flatten()
    weights = h[:, :3].sigmoid().flatten().repeat_interleave(2)
    counted = torch.zeros(GROUPS).scatter_add_(0, picked, weights)
    return (counted * scores.mean(0)).sum() / weights.sum()


def over_layers(s: Any, h: Tensor, g: Tensor) -> Tensor:
    """One table that is added to again and again."""
    total = zeros()
    for scale in (1.0, 2.0):
        total.index_add_(0, g, h * scale, alpha=0.5)
        total.index_put_((g,), h, accumulate=True)
        total.scatter_add_(0, rows(g), h * h)
    return total.square().sum()


def read_between(s: Any, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    total = s.start * 2
    total.index_add_(0, g, h)
    between = total * 2
    total.mul_(3)
    total.index_add_(0, g, h.sin())
    return between, total


def written_afterwards(s: Any, h: Tensor, g: Tensor) -> Tensor:
    total = s.start.index_add(0, g, h)
    total.add_(1)
    return total.sin()


def half_written(s: Any, h: Tensor, g: Tensor) -> Tensor:
    total = torch.zeros(2, GROUPS, C)
    total[1].index_add_(0, g, h)
    total[0] = total[1] * 2
    return total.sin()


def usage(s: Any, h: Tensor, g: Tensor) -> Tensor:
    """A buffer that counts, and a loss that reads it."""
    s.counts.scatter_add_(0, g, torch.ones_like(g))
    return h.mean() + s.counts.square().sum()


ADDED: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "scatter_add": lambda s, h, g: zeros().scatter_add(0, rows(g), h).sin(),
    "scatter_add to a parameter": lambda s, h, g: s.start.scatter_add(0, rows(g), h).sin(),
    "scatter_add of ones": lambda s, h, g: (
        torch.zeros(4).scatter_add(0, g, torch.ones(g.shape)) * h.mean()
    ),
    "scatter_reduce": lambda s, h, g: s.start.scatter_reduce(0, rows(g), h, "sum").sin(),
    "index_add": lambda s, h, g: zeros().index_add(0, g, h, alpha=2).sin(),
    "index_add, turned": lambda s, h, g: zeros().t().index_add(1, g, h.t()).sin(),
    "index_put": lambda s, h, g: s.start.index_put((g,), h, accumulate=True).sin(),
    "index_put of a number": lambda s, h, g: (
        torch.zeros(4).index_put((g,), torch.ones(()), accumulate=True) * h.mean()
    ),
    "index_put in two dimensions": lambda s, h, g: zeros().index_put(
        (g, h.argmax(1)), h.amax(1), accumulate=True
    ),
    "histogram": lambda s, h, g: torch.histc(h.detach(), bins=5, min=-1, max=1) * h.mean(),
    "means of groups": lambda s, h, g: (
        zeros().index_add(0, g, h)
        / torch.zeros(4).index_add(0, g, torch.ones(g.shape))[:, None].clamp(1)
    ),
    "tokens": tokens,
    "over layers": over_layers,
    "read between": read_between,
    "written afterwards": written_afterwards,
    "a part of a value": half_written,
    "usage": usage,
}


@pytest.mark.parametrize("name", ADDED)
def test_what_samples_add_is_summed_over_the_batch(name: str) -> None:
    pipe = pipelined(Model(ADDED[name]))
    for size in (BATCH, 6, 2):
        assert_agrees(pipe, batch(size))


MIXED: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "read by the samples": lambda s, h, g: h + zeros().index_add(0, g, h)[0],
    "a row for each sample": lambda s, h, g: torch.zeros(9, C).scatter_add(1, rows(g), h),
    "the largest of each group": lambda s, h, g: s.start.scatter_reduce(0, rows(g), h, "amax"),
    "without what was there": lambda s, h, g: s.start.scatter_reduce(
        0, rows(g), h, "sum", include_self=False
    ),
    "the last of each group": lambda s, h, g: zeros().index_put((g,), h),
    "copied": lambda s, h, g: zeros().index_copy(0, g, h),
    "a histogram between the batch's own bounds": lambda s, h, g: torch.histc(h.detach(), 5),
    "at its number": lambda s, h, g: torch.zeros(9, C).index_add(0, torch.arange(h.shape[0]), h),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_no_sum_is_refused(name: str) -> None:
    with pytest.raises(CouplingError) as caught:
        pipelined(Model(MIXED[name]))(batch())
    assert str(caught.value.source).rpartition(":")[0] == __file__


@pytest.mark.full
@pytest.mark.parametrize(("kind", "padded"), [("Mixtral", False), ("Qwen3Moe", True)])
def test_losses_of_routers(kind: str, padded: bool) -> None:
    """Of transformers' mixtures of experts: how often times how likely an expert is chosen."""
    import transformers

    names = {"num_local_experts": 4} if kind == "Mixtral" else {"num_experts": 4}
    names |= {} if kind == "Mixtral" else {"moe_intermediate_size": 16}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        use_cache=False,
        attn_implementation="eager",
        **names,
    )
    torch.set_default_dtype(torch.float32)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    ids = torch.randint(0, 80, (8, 12))
    inputs = {"input_ids": ids, "labels": ids}
    if padded:
        inputs["attention_mask"] = (torch.arange(12) < torch.randint(4, 13, (8, 1))).long()
    report = pipelined(model).verify(**inputs)
    assert report.ok, report
    assert sum(d.kind == "output" and "loss" in d.name for d in report.differences) == 2
