"""Other people's loops besides the Trainer: Accelerate and Lightning.

Each runs twice from the same seed, with a pipelined model and with the plain one.
"""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import autopipe
from tests.support.agreement import pipelined
from tests.support.training import RELATIVE, Tokens, assert_same_weights, model

pytestmark = pytest.mark.usefixtures("alike_models_once")

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_fit.py"

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


@pytest.mark.full
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


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_lightning_with_the_pipeline_as_a_child(tmp_path: Path) -> None:
    plain, ours = Lit(model()), Lit(pipelined(model()))
    fit(plain, tmp_path / "plain", 2)
    fit(ours, tmp_path / "ours", 2)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert_same_weights(ours, plain)


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, "InStages"])
def test_lightning_leaves_an_optimizers_state_in_the_stages(kind: Any) -> None:
    """The strategy of the example; torch's meta device stands for Lightning's GPU.

    That Lightning's own moves the state shows that this test would see it.
    """
    example = runpy.run_path(str(EXAMPLE)) if kind == "InStages" else {}
    strategy = example.get(kind, kind)(torch.device("meta"))
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] += 1
    strategy.optimizers = [optimizer]
    strategy.load_optimizer_state_dict({"optimizer_states": [saved]})
    found = optimizer.state[layer.weight]["exp_avg"]
    assert found.is_meta == (kind is SingleDeviceStrategy)
    if kind == "InStages":
        strategy.model_to_device()
        assert torch.equal(found, saved["state"][0]["exp_avg"])
