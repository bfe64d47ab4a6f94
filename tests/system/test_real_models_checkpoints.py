"""`torch.utils.checkpoint` in a model: `remat` decides what is recomputed, and a note says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.support.agreement import assert_agrees, pipelined

pytestmark = pytest.mark.few(3)
NOTE = "note: torch.utils.checkpoint"
X = torch.randn(6, 4, dtype=torch.float64)

HOW: dict[str, Callable[[nn.Sequential, Tensor], Any]] = {
    "reentrant": lambda part, x: checkpoint(part, x, use_reentrant=True),
    "not reentrant": lambda part, x: checkpoint(part, x, use_reentrant=False),
    "without the random state": lambda part, x: checkpoint(
        part, x, use_reentrant=False, preserve_rng_state=False
    ),
    "sequential": lambda part, x: checkpoint_sequential(part, 2, x, use_reentrant=False),
}


class Model(nn.Module):
    def __init__(self, how: Callable[[nn.Sequential, Tensor], Any], dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4).double()
        self.part = nn.Sequential(
            nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 4)
        ).double()
        self.last = nn.Linear(4, 2).double()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.last(self.how(self.part, self.first(x)))


def step(model: nn.Module, **options: Any) -> list[Tensor]:
    """The result and the gradients of one step with a seed."""
    pipe = pipelined(model, **options)
    torch.manual_seed(3)
    found = pipe(X)
    found.square().sum().backward()
    return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("how", HOW)
def test_values_gradients_and_a_note(how: str, remat: str) -> None:
    pipe = pipelined(Model(HOW[how]), remat=remat)
    assert_agrees(pipe, X)
    notes = [line for line in str(pipe.explain()).splitlines() if line.startswith(NOTE)]
    assert len(notes) == 1
    assert "test_real_models_checkpoints.py" in notes[0]
    assert "remat decides" in notes[0]


@pytest.mark.parametrize("remat", ["none", "full", "min-cut"])
@pytest.mark.parametrize("how", HOW)
def test_dropout_draws_the_same_numbers_as_without_it(how: str, remat: str) -> None:
    found = step(Model(HOW[how], 0.5), remat=remat)
    expected = step(Model(lambda part, x: part(x), 0.5), remat="none")
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_a_model_without_it_has_no_note() -> None:
    pipe = pipelined(Model(lambda part, x: part(x)), args=(X,))
    assert NOTE not in str(pipe.explain())


def test_a_model_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).double().train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(0, 32, (6, 8))
    expected = model(input_ids=ids, labels=ids).loss
    gradients = torch.autograd.grad(expected, [*model.parameters()])
    pipe = pipelined(model, remat="none")
    loss = pipe(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the loss is in float32
    loss.backward()
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        scale = float(g.abs().max())
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-6 * scale, msg=name)
    assert NOTE in str(pipe.explain())
