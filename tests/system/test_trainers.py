"""Other people's loops: the real Trainer of transformers, Accelerate, Lightning, PEFT.

Each runs twice from the same seed, with a pipelined model and with the plain one, in double
precision and without dropout; logs and final weights agree.

`Pipeline.install` is how a model stays what it is (a `PreTrainedModel`, a `PeftModel`) and yet runs
as a pipeline: the hook that `nn.Module.compile` uses. Trainers look at a model's class, signature,
`config` and `save_pretrained`, so they want the model, not a module around it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import autopipe
from tests.support.agreement import assert_close, pipelined
from tests.support.models import gpt2
from tests.support.training import (
    RELATIVE,
    Tokens,
    assert_same_log,
    assert_same_weights,
    model,
    numbers,
    trainer,
)

pytestmark = pytest.mark.usefixtures("alike_models_once")

# ------------------------------------------------------------------------------- transformers


TRAINING: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating, clipped": {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    },
    "decayed, smoothed": {
        "optim": "adamw_torch_fused",
        "weight_decay": 0.5,
        "label_smoothing_factor": 0.1,
        "gradient_checkpointing": True,
    },
}


@pytest.mark.full
@pytest.mark.parametrize("case", TRAINING)
def test_trainer(case: str, tmp_path: Path) -> None:
    plain = trainer(model(), tmp_path / "plain", **TRAINING[case])
    ours = trainer(pipelined(model()).install(), tmp_path / "ours", **TRAINING[case])
    plain.train()
    ours.train()
    assert_same_log(ours, plain)
    assert_same_weights(ours.model, plain.model)
    expected, found = plain.predict(Tokens(8, 2)), ours.predict(Tokens(8, 2))
    assert_close(torch.from_numpy(found.label_ids), torch.from_numpy(expected.label_ids))
    torch.testing.assert_close(
        torch.from_numpy(found.predictions),
        torch.from_numpy(expected.predictions),
        rtol=0,
        atol=RELATIVE,
    )


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("case", ["plain", "accumulating, clipped"])
def test_trainer_with_a_schedule_that_starts_backwards_early(
    case: str, schedule: str, tmp_path: Path
) -> None:
    plain = trainer(model(), tmp_path / "plain", **TRAINING[case])
    ours = trainer(
        pipelined(model(), schedule=schedule).install(), tmp_path / "ours", **TRAINING[case]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the backward is not that")
        plain.train()
        ours.train()
    assert_same_log(ours, plain)
    assert_same_weights(ours.model, plain.model)


@pytest.mark.full
def test_trainer_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Its own and the plain model's, either way round; the checkpoint is the plain model's."""
    whole = trainer(model(), tmp_path / "whole")
    whole.train()
    ours = trainer(pipelined(model()).install(), tmp_path / "ours")
    ours.train()
    for source in ("whole", "ours"):
        checkpoint = tmp_path / source / "checkpoint-3"
        loaded = transformers.GPT2LMHeadModel.from_pretrained(checkpoint)
        assert loaded.dtype is torch.double
        assert {n for n, _ in loaded.named_parameters()} == {
            n for n, _ in model().named_parameters()
        }
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        for n, fresh in enumerate((model(), pipelined(model()).install())):
            resumed = trainer(fresh, tmp_path / f"resumed {n} {source}")
            resumed.train(resume_from_checkpoint=str(checkpoint))
            assert_same_log(resumed, whole)
            assert_same_weights(resumed.model, whole.model)


@pytest.mark.full
def test_trainer_keeps_the_best_model(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "learning_rate": 3e-2, "max_steps": 9}
    runs = []
    for n, module in enumerate((model(), pipelined(model()).install())):
        runs.append(trainer(module, tmp_path / str(n), **options))
        runs[-1].train()
    assert runs[0].state.best_global_step == runs[1].state.best_global_step < 9
    assert_same_weights(runs[1].model, runs[0].model)


@pytest.mark.full
def test_trainer_in_mixed_precision(tmp_path: Path) -> None:
    """The Trainer puts the model's forward under autocast; so are micro-batches, one here.

    With their own loss, and equal to the bit: the kernels and their order are the model's own.
    """
    runs = []
    for n, module in enumerate(
        (gpt2(layers=1)[0], pipelined(gpt2(layers=1)[0], chunks=1).install())
    ):
        runs.append(trainer(module, tmp_path / str(n), bf16=True, max_steps=3))
        runs[-1].train()
    assert numbers(runs[1]) == numbers(runs[0])


@pytest.mark.parametrize("sampled", [False, True])
def test_generation_after_training(sampled: bool) -> None:
    """`generate` of an installed model calls it with a cache: those calls run the plain model."""
    pipe = pipelined(model())
    installed = pipe.install()
    prompt = torch.arange(4)[None].repeat(3, 1)
    options = {"max_new_tokens": 5, "do_sample": sampled}
    pipe(input_ids=prompt, labels=prompt).loss.backward()
    plain = model()
    torch.manual_seed(1)
    expected = plain.generate(prompt, **options)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="key/value cache .* runs the plain model .*said once"):
        found = installed.generate(prompt, **options)
    assert torch.equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        assert torch.equal(pipe.generate(prompt, **options), expected)
    assert autopipe.explain_captures(pipe).count == 1


def test_generation_without_a_cache_runs_the_pipeline() -> None:
    pipe = pipelined(model())
    prompt = torch.arange(4)[None].repeat(3, 1)
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    expected = model().generate(prompt, **options)
    assert torch.equal(pipe.install().generate(prompt, **options), expected)
    assert autopipe.explain_captures(pipe).count <= 3  # of any length from the second on


def test_an_encoder_decoder_generates() -> None:
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    prompt = torch.arange(1, 5)[None].repeat(3, 1)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = t5.generate(prompt, **options)
    pipe = autopipe.compile(t5, 2, 3)
    with pytest.warns(UserWarning, match="runs the plain model"):
        assert torch.equal(pipe.install().generate(prompt, **options), expected)


@pytest.mark.full
def test_a_pipeline_as_the_trainers_model(tmp_path: Path) -> None:
    """What one must say today that Trainer else reads off the model's class and attributes."""
    pipe = pipelined(model())
    pipe.to = lambda *_, **__: pipe  # Trainer and Accelerate both call it
    pipe.loss_type = pipe.model.loss_type  # else labels are counted unshifted: another loss
    options = {
        "label_names": ["labels"],  # else no loss in evaluation
        "remove_unused_columns": False,  # else no column is left
        "save_strategy": "no",  # safetensors.save_file refuses tied weights
        "gradient_accumulation_steps": 2,
    }
    ours = trainer(pipe, tmp_path / "ours", **options)
    plain = trainer(model(), tmp_path / "plain", **options)
    ours.train()
    plain.train()
    assert_same_log(ours, plain)
    assert_same_weights(ours.model, plain.model)


@pytest.mark.full
def test_a_pipeline_as_the_trainers_model_without_ado(tmp_path: Path) -> None:
    options = {"label_names": ["labels"], "remove_unused_columns": False, "save_strategy": "no"}
    ours = trainer(pipelined(model()), tmp_path / "ours", **options)
    plain = trainer(model(), tmp_path / "plain", **options)
    ours.train()
    plain.train()
    assert_same_log(ours, plain)
