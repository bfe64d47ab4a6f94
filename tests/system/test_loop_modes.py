"""The loop's surroundings: precision, evaluation in between, and steps that go wrong.

Truth is a copy of the model in eager torch (`tests.support.loops`); where the precision is lower
than float32 it is the copy run over the same micro-batches, compared bit for bit.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe import errors
from tests.support.agreement import assert_close, pipelined
from tests.support.loops import Net, alike, assert_same_state, ids, loss_of, net
from tests.support.worker_threads import busy_threads, threads_left

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]

# ------------------------------------------------------------------------------- precision


def over_chunks(model: nn.Module, step: int, dtype: torch.dtype | None) -> Tensor:
    """The loss of a training step, chunk by chunk as a pipeline cuts them; autocast to `dtype`."""
    chunks = ids(step).tensor_split(3)
    outs = []
    for chunk in chunks:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            outs.append(model(chunk))
    whole = torch.cat([o.detach() for o in outs]).requires_grad_()
    loss = whole.float().pow(2).mean()
    loss.backward()
    for out, gradient in zip(outs, whole.grad.split([len(c) for c in chunks]), strict=True):
        out.backward(gradient)
    return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_call(dtype: torch.dtype) -> None:
    """Forward under autocast, backward outside of it."""
    model = net().float()
    reference = copy.deepcopy(model)
    pipe = pipelined(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (pipe, reference)]
    for step in range(3):
        with torch.autocast("cpu", dtype=dtype):
            out = pipe(ids(step))
        assert out.dtype is dtype
        loss = out.float().pow(2).mean()
        loss.backward()
        assert torch.equal(loss, over_chunks(reference, step, dtype))
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_autocast_switched_on_and_off() -> None:
    """One pipeline, called in turn with and without, in both dtypes, and under autocast(False)."""
    pipe, reference = pipelined(net().float(), chunks=1), net().float()
    for dtype in (None, torch.bfloat16, torch.float16, None, torch.bfloat16):
        kind = dtype or torch.float32
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            found, expected = pipe(ids()), reference(ids())
            with torch.autocast("cpu", enabled=False):
                assert pipe(ids()).dtype is torch.float32
        assert found.dtype is kind
        assert torch.equal(found, expected)


class Mixed(Net):
    """Autocast is the model's own affair, and its last layers are kept out of it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.first(self.table(x))
            with torch.autocast("cpu", enabled=False):
                x = self.norm(x.float())
            x = self.second(x)
        return self.head(self.last_norm(x.float()))


def test_autocast_in_the_model() -> None:
    torch.manual_seed(0)
    model = Mixed()
    reference = copy.deepcopy(model)
    pipe = pipelined(model, devices=3)
    for step in range(2):
        out = pipe(ids(step))
        assert out.dtype is torch.float32
        loss = out.pow(2).mean()
        loss.backward()
        assert torch.equal(loss, over_chunks(reference, step, None))
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
        pipe.zero_grad()
        reference.zero_grad()


def test_gradient_scaling() -> None:
    """Scaled loss, unscaling, clipping, a step that is skipped, and the scale's own course."""

    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        scales, norms = [], []
        for step in range(6):
            loss = loss_of(module, step)
            if step == 3:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.1))
            before = module.first.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(module.first.weight, before) == (step == 3)
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        assert scales == [2.0**12, 2.0**13, 2.0**13, 2.0**12, 2.0**12, 2.0**13]
        return norms

    alike(loop)


def test_gradient_scaling_of_half_precision() -> None:
    """float16 under autocast with a scaler, the recipe for mixed precision."""
    model = net().float()
    reference = copy.deepcopy(model)
    pipe = pipelined(model, chunks=1)
    scales = []
    for module in (pipe, reference):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        for step in range(5):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(module, step)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] < 2.0**20, "gradients overflowed and the scale came down"
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q), name


# ------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps(off: Any) -> None:
    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        found = []
        for step in range(3):
            module.train()
            loss_of(module, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            module.eval()
            with off():
                for batch in (2, 9, 1):
                    out = module(ids(10 + step, batch))
                    assert not out.requires_grad
                    found.append(out.clone())
        return found

    alike(loop)


def test_a_first_call_in_inference_mode() -> None:
    """What is made on a first call, constants of the model among it, must serve training too."""

    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.arange(1.0, 12.0).double().tanh()

    def loop(module: nn.Module) -> Any:
        with torch.inference_mode():
            module(ids())
        with torch.no_grad():
            module(ids(1))
        out = module(ids())
        out.pow(2).sum().backward()
        return out

    torch.manual_seed(0)
    alike(loop, Scaled().double())


def test_evaluation_between_forward_and_backward() -> None:
    def loop(module: nn.Module) -> Any:
        loss = loss_of(module)
        module.eval()
        with torch.no_grad():
            value = loss_of(module, 1)
        module.train()
        loss.backward()
        return loss, value

    alike(loop)


def test_parts_in_evaluation_mode() -> None:
    """A frozen part of the model in eval mode while the rest trains: its dropout is off."""

    def loop(module: nn.Module) -> Any:
        module.train()
        module.drop.eval()
        first = loss_of(module)
        first.backward()
        module.eval()
        assert not any(m.training for m in module.modules())
        return first, loss_of(module)

    model = net()
    model.drop.p = 0.9
    alike(loop, model)


def test_gradients_in_evaluation_mode() -> None:
    """Saliency: gradients of the inputs, of a model that is frozen and in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 6)).double()
    x = torch.randn(7, 6, dtype=torch.double)

    def loop(module: nn.Module) -> Any:
        module.eval().requires_grad_(False)
        mine = x.clone().requires_grad_()
        return torch.autograd.grad(module(mine).pow(2).sum(), mine)

    alike(loop, model)


# ------------------------------------------------------------------------------- failures


class LossError(Exception):
    pass


def refuse(*_: Any) -> Tensor:
    raise LossError("no loss for you")


@pytest.mark.parametrize("where", ["between forward and backward", "in loss_fn of step"])
def test_an_exception_in_the_users_loss(where: str) -> None:
    """Nothing of that step is kept or works on, and the next one is as if it had not been."""
    functions = [refuse, F.mse_loss]
    model = net()
    reference = copy.deepcopy(model)
    pipe = pipelined(model, loss_fn=lambda out, target: functions[0](out, target))
    target = torch.zeros(7, 5, 11, dtype=torch.double)
    threads = set(threading.enumerate())

    def step(pipe: autopipe.Pipeline = pipe) -> None:
        if where == "in loss_fn of step":
            pipe.step(ids(), target=target)
        else:
            out = pipe(ids())
            seen.append(weakref.ref(out))
            functions[0](out, target).backward()

    for _ in range(2):
        seen: list[weakref.ref[Tensor]] = []
        with pytest.raises(LossError, match="for you"):
            step()
        gc.collect()
        assert [r() for r in seen if r() is not None] == []
        assert [s.now for s in pipe.memory.stages] == [0, 0]
        assert busy_threads(threads) == []
        assert all(p.grad is None for p in model.parameters())
    functions.pop(0)
    step()
    F.mse_loss(reference(ids()), target).backward()
    assert_same_state(pipe, reference)
    del pipe, step
    assert threads_left(threads) == []


def test_an_exception_in_a_parameters_hook() -> None:
    """It comes up from backward; what the pipeline kept for that call is gone already."""
    pipe, reference = pipelined(net()), net()
    handle = pipe.model.first.weight.register_hook(refuse)
    with pytest.raises(LossError, match="for you"):
        loss_of(pipe).backward()
    assert [s.now for s in pipe.memory.stages] == [0, 0]
    handle.remove()
    pipe.zero_grad()
    for module in (pipe, reference):
        loss_of(module).backward()
    assert_same_state(pipe, reference)


def test_a_loss_that_is_not_a_number() -> None:
    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        losses = []
        for step in range(4):
            loss = loss_of(module, step) * (float("nan") if step == 1 else 1.0)
            losses.append(loss)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            assert norm.isnan() == (step == 1)
            if norm.isfinite():
                optimizer.step()
            optimizer.zero_grad()
        return losses

    alike(loop)


def test_parameters_that_are_not_numbers() -> None:
    """One NaN in the head's table spreads as it does in the model."""

    def loop(module: nn.Module) -> Any:
        with torch.no_grad():
            module.table.weight[3, 2] = float("nan")
        loss = loss_of(module)
        loss.backward()
        return loss

    alike(loop)


def test_anomaly_detection() -> None:
    pipe, reference = pipelined(net()), net()
    with torch.autograd.set_detect_anomaly(True):
        for module in (pipe, reference):
            loss_of(module).backward()
    assert_same_state(pipe, reference)


def test_anomaly_detection_finds_the_pipeline() -> None:
    """Once compiled, a backward that makes NaN is reported as in eager torch."""

    def loop(module: nn.Module) -> Any:
        loss_of(module).backward()
        with torch.autograd.set_detect_anomaly(True):
            out = module(ids())
            with (
                pytest.warns(UserWarning, match="Error detected"),
                pytest.raises(RuntimeError, match="returned nan values"),
            ):
                (out * float("nan")).sum().backward()

    torch.manual_seed(0)
    alike(loop, nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11), nn.Tanh()).double())


def test_step_returns_the_loss_of_a_closure() -> None:
    """`pipe.step` in the place of forward, loss and backward, accumulating and with a scheduler."""
    model = net()
    reference = copy.deepcopy(model)
    pipe = pipelined(model, loss_fn=lambda out, x: out.logsumexp(-1).mean() - out[..., 0].mean())
    ours, theirs = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (pipe, reference))
    for step in range(4):
        found = pipe.step(ids(step), target=None)
        out = reference(ids(step))
        expected = out.logsumexp(-1).mean() - out[..., 0].mean()
        expected.backward()
        assert_close(found, expected.detach())
        if step % 2:
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
    assert_same_state(pipe, reference)


def test_step_without_a_loss() -> None:
    pipe = autopipe.compile(net(), 2, 3, loss_fn=lambda out, target: out)
    with pytest.raises(errors.OptionError, match="step needs a loss"):
        pipe.step(ids())
    gc.collect()
    assert [s.now for s in pipe.memory.stages] == [0, 0]
