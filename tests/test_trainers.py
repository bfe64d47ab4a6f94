"""Other people's loops: the real Trainer of transformers, Accelerate, Lightning, PEFT.

Each runs twice from the same seed, with a pipelined model and with the plain one, in double
precision and without dropout; logs and final weights agree.

`Pipeline.install` is how a model stays what it is (a `PreTrainedModel`, a `PeftModel`) and yet runs
as a pipeline: the hook that `nn.Module.compile` uses. Trainers look at a model's class, signature,
`config` and `save_pretrained`, so they want the model, not a module around it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning
import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import autopipe

from .agreement import assert_close, pipelined
from .models import gpt2

pytestmark = pytest.mark.slow
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


# ------------------------------------------------------------------------------- transformers


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


def test_trainer_keeps_the_best_model(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "learning_rate": 3e-2, "max_steps": 9}
    runs = []
    for n, module in enumerate((model(), pipelined(model()).install())):
        runs.append(trainer(module, tmp_path / str(n), **options))
        runs[-1].train()
    assert runs[0].state.best_global_step == runs[1].state.best_global_step < 9
    assert_same_weights(runs[1].model, runs[0].model)


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


def test_generation_after_training(tmp_path: Path) -> None:
    """`generate` calls the model with a cache, which a pipeline refuses: it needs the model."""
    pipe = pipelined(model())
    prompt = torch.arange(4)[None].repeat(3, 1)
    options = {"max_new_tokens": 5, "do_sample": False}
    pipe(input_ids=prompt, labels=prompt).loss.backward()
    expected = model().generate(prompt, **options)
    assert torch.equal(pipe.model.generate(prompt, **options), expected)


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


def test_a_pipeline_as_the_trainers_model_without_ado(tmp_path: Path) -> None:
    options = {"label_names": ["labels"], "remove_unused_columns": False, "save_strategy": "no"}
    ours = trainer(pipelined(model()), tmp_path / "ours", **options)
    plain = trainer(model(), tmp_path / "plain", **options)
    ours.train()
    plain.train()
    assert_same_log(ours, plain)


# ------------------------------------------------------------------------------- Accelerate


def accelerate(module: nn.Module, path: Path) -> tuple[nn.Module, list[float]]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    prepared = accelerator.prepare(module, optimizer, DataLoader(Tokens(20, 0), 6), schedule)
    module, optimizer, loader, schedule = prepared
    losses = []
    for epoch in range(3):
        for batch in loader:
            with accelerator.accumulate(module):
                loss = module(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(module.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        if epoch == 0:
            accelerator.save_state(str(path))
        if epoch == 1:
            accelerator.load_state(str(path))
    return accelerator.unwrap_model(module), losses


def test_accelerate(tmp_path: Path) -> None:
    inner = pipelined(model()).install()
    ours, found = accelerate(inner, tmp_path / "ours")
    plain, expected = accelerate(model(), tmp_path / "plain")
    assert ours is inner
    assert found == pytest.approx(expected, rel=RELATIVE)
    assert found[4:8] == pytest.approx(found[8:], rel=RELATIVE), "the state was loaded"
    assert_same_weights(ours, plain)


# ------------------------------------------------------------------------------- Lightning


class Lit(lightning.LightningModule):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], n: int) -> Tensor:
        loss = self.body(**batch).loss
        self.seen.append(loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor], n: int) -> None:
        self.seen.append(self.body(**batch).loss)
        assert not self.seen[-1].requires_grad
        self.log("validation", self.seen[-1], batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


class Beside(Lit):
    """The model is the child, the pipeline stands beside: nothing walks into it."""

    def __init__(self, pipe: autopipe.Pipeline) -> None:
        super().__init__(pipe.model)
        self.beside = [pipe]

    def training_step(self, batch: dict[str, Tensor], n: int) -> Tensor:
        loss = self.beside[0](**batch).loss
        self.seen.append(loss.detach())
        return loss


def fit(module: Lit, path: Path, epochs: int, checkpoint: Path | None = None) -> Path:
    run = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        default_root_dir=path,
    )
    loaders = DataLoader(Tokens(20, 0), 6), DataLoader(Tokens(7, 1), 5)
    run.fit(module, *loaders, ckpt_path=checkpoint, weights_only=False)
    run.save_checkpoint(path / f"{epochs}.ckpt")
    return path / f"{epochs}.ckpt"


@pytest.mark.parametrize("kind", ["run by the pipeline", "beside"])
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_lightning(kind: str, tmp_path: Path) -> None:
    """Three epochs, against two and a third from the checkpoint, which either may have written."""

    def ours() -> Lit:
        pipe = pipelined(model())
        return Beside(pipe) if kind == "beside" else Lit(pipe.install())

    whole = Lit(model())
    fit(whole, tmp_path / "whole", 3)
    files = []
    for n, module in enumerate((Lit(model()), ours())):
        files.append(fit(module, tmp_path / str(n), 2))
    for file in files:
        for n, module in enumerate((Lit(model()), ours())):
            fit(module, tmp_path / f"{n} from {file.parent.name}", 3, file)
            assert_same_weights(module, whole)
            third = torch.stack(module.seen[-6:]), torch.stack(whole.seen[-6:])
            torch.testing.assert_close(*third, rtol=RELATIVE, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_lightning_with_the_pipeline_as_a_child(tmp_path: Path) -> None:
    plain, ours = Lit(model()), Lit(pipelined(model()))
    fit(plain, tmp_path / "plain", 2)
    fit(ours, tmp_path / "ours", 2)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert_same_weights(ours, plain)


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


def test_a_copy_of_a_model_that_a_pipeline_runs() -> None:
    """The hook is not copied: the copy is a plain model."""
    inner = pipelined(model()).install()
    twin = copy.deepcopy(inner)
    assert twin._compiled_call_impl is None
    assert_close(twin(**batch()).loss, inner(**batch()).loss)
