"""A language model in double precision, tokens, and the Trainer of transformers on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.support.models import gpt2

RELATIVE = 1e-10
"""Of logged numbers after some steps of Adam: rounding is 1e-16, and grows a little each step."""


def causal_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None, **_: Any
) -> Tensor:
    """transformers' own, but that it does not round to float32."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    how = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction=how)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def double(made: transformers.GPT2LMHeadModel) -> transformers.GPT2LMHeadModel:
    made.loss_function = causal_loss
    return made.double()


def model() -> transformers.GPT2LMHeadModel:
    return double(gpt2(layers=1)[0])


class Tokens(Dataset):
    """Random tokens; the last batch of an epoch is a smaller one."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 64, (count, 16), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        labels = self.ids[n].clone()
        labels[: n % 5] = -100
        return {"input_ids": self.ids[n], "labels": labels}


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=RELATIVE, msg=lambda m, n=name: f"{n}: {m}")


def trainer(module: nn.Module, path: Path, **options: Any) -> transformers.Trainer:
    arguments: dict[str, Any] = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 6,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
    }
    return transformers.Trainer(
        module,
        transformers.TrainingArguments(str(path), **(arguments | options)),
        train_dataset=Tokens(20, 0),
        eval_dataset=Tokens(7, 1),
    )


def numbers(run: transformers.Trainer) -> list[dict[str, float]]:
    """Its log, without times, and without the mean that a resumed run takes over fewer steps."""
    names = ("loss", "eval_loss", "grad_norm", "learning_rate", "step", "epoch")
    return [{k: v for k, v in e.items() if k in names} for e in run.state.log_history]


def assert_same_log(found: transformers.Trainer, expected: transformers.Trainer) -> None:
    a, b = numbers(found), numbers(expected)
    assert len(a) == len(b) > 6
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=RELATIVE)
