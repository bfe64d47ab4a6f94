"""Adapters of PEFT, trained on a pipelined model and on the plain one from the same seed."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.support.agreement import assert_close, pipelined
from tests.support.training import Tokens, assert_same_log, assert_same_weights, model, trainer

pytestmark = pytest.mark.usefixtures("alike_models_once")

# ------------------------------------------------------------------------------- PEFT


def lora(base: nn.Module) -> peft.PeftModel:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    made = peft.get_peft_model(base, config)
    with torch.no_grad():  # adapters start at zero, where half of their gradients vanish
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return made.double()


def batch() -> dict[str, Tensor]:
    made = Tokens(7, 0)
    return {k: torch.stack([made[n][k] for n in range(7)]) for k in made[0]}


def test_adapters(tmp_path: Path) -> None:
    plain, adapted = lora(model()), lora(model())
    pipe = pipelined(adapted)
    for module in (plain, pipe):
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = module(**batch()).loss
            loss.backward()
            optimizer.step()
    for (name, p), q in zip(adapted.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == ("lora" not in name)
        assert_close(p.grad, q[1].grad, name)
    assert_same_weights(adapted, plain)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model(), str(tmp_path)).double()
    expected = plain(**batch()).loss
    assert_close(loaded(**batch()).loss, expected)
    assert_close(pipelined(loaded)(**batch()).loss, expected)
    assert_close(pipelined(loaded.merge_and_unload())(**batch()).loss, expected)


@pytest.mark.full
def test_trainer_of_adapters(tmp_path: Path) -> None:
    runs = []
    for n, module in enumerate((lora(model()), pipelined(lora(model())).install())):
        runs.append(trainer(module, tmp_path / str(n)))
        runs[-1].train()
    assert_same_log(runs[1], runs[0])
    assert_same_weights(runs[1].model, runs[0].model)
    assert (tmp_path / "1/checkpoint-3/adapter_model.safetensors").exists()
    again = trainer(pipelined(lora(model())).install(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "1/checkpoint-3"))
    assert_same_weights(again.model, runs[0].model)


@pytest.mark.full
@pytest.mark.parametrize("how", ["disabled", "merged"])
def test_adapters_switched_off(how: str) -> None:
    """Disabled, as preference tuning does for the reference model's opinion; merged in place."""
    plain, adapted = lora(model()), lora(model())
    pipe = pipelined(adapted)
    assert_close(pipe(**batch()).loss, plain(**batch()).loss)
    if how == "merged":
        plain.merge_adapter(), adapted.merge_adapter()
        assert_close(pipe(**batch()).loss, plain(**batch()).loss)
    else:
        with plain.disable_adapter(), adapted.disable_adapter():
            assert_close(pipe(**batch()).loss, plain(**batch()).loss)


@pytest.mark.full
def test_prompt_tuning() -> None:
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(
        num_virtual_tokens=3,
        task_type="CAUSAL_LM",
        token_dim=32,
        num_layers=1,
        num_attention_heads=2,
        num_transformer_submodules=1,
    )
    tuned = peft.get_peft_model(model(), config).double()
    plain = copy.deepcopy(tuned)
    short = {k: v[:, :10] for k, v in batch().items()}
    for module in (pipelined(tuned), plain):
        module(**short).loss.backward()
    for (name, p), q in zip(tuned.named_parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, name)


@pytest.mark.full
def test_a_copy_of_a_model_that_a_pipeline_runs() -> None:
    """The hook is not copied: the copy is a plain model."""
    inner = pipelined(model()).install()
    twin = copy.deepcopy(inner)
    assert twin._compiled_call_impl is None
    assert_close(twin(**batch()).loss, inner(**batch()).loss)
