"""What people do to models around the loop: copies, averages, moves, checkpoints.

Truth is a copy of the model under the same treatment (`tests.support.loops.alike`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import autopipe
from autopipe import errors
from tests.support.agreement import assert_close, pipelined
from tests.support.loops import Net, alike, assert_same_state, ids, loss_of, net, train

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]

# ------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
def test_a_copy_trains_on_its_own(called: bool) -> None:
    def loop(module: nn.Module) -> Any:
        if called:
            train(module, 1)
        twin = copy.deepcopy(module)
        mine = {id(p) for p in module.parameters()}
        assert not mine & {id(p) for p in twin.parameters()}
        assert twin.head.weight is twin.table.weight
        before = [p.detach().clone() for p in module.parameters()]
        losses = train(twin, 2)
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        return losses, train(module, 3), [p.detach() for p in twin.parameters()]

    alike(loop)


def test_a_copy_of_pipeline_and_optimizer_together() -> None:
    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        loss_of(module).backward()
        optimizer.step()
        twin, its = copy.deepcopy((module, optimizer))
        loss_of(twin, 1).backward()
        its.step()
        return [p.detach() for p in twin.parameters()]

    alike(loop)


@pytest.mark.parametrize("multi", [False, True], ids=["mean", "exponential"])
def test_averages_of_parameters(multi: bool) -> None:
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.7)} if multi else {}

    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        average = AveragedModel(module, **options)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(module, step).backward()
            optimizer.step()
            average.update_parameters(module)
        average.eval()
        with torch.no_grad():
            found = loss_of(average, 9)
            assert not torch.equal(found, loss_of(module, 9))
        assert "module.first.weight" in average.state_dict()
        return found, list(average.state_dict().values())

    alike(loop)


def test_an_average_of_the_model_fed_by_the_pipeline() -> None:
    pipe = pipelined(net())
    average = AveragedModel(pipe.model)
    train(pipe, 2)
    average.update_parameters(pipe)
    for p, q in zip(average.parameters(), pipe.parameters(), strict=True):
        assert torch.equal(p, q)


def test_parameters_as_one_vector() -> None:
    def loop(module: nn.Module) -> Any:
        loss_of(module)
        vector = nn.utils.parameters_to_vector(module.parameters())
        nn.utils.vector_to_parameters(vector * 0.9, module.parameters())
        loss = loss_of(module)
        loss.backward()
        return loss

    alike(loop)


# ------------------------------------------------------------------------------- moves and casts

MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "to meta": lambda m: m.to("meta"),
    "to a dtype": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "cuda": lambda m: m.cuda(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("move", MOVES)
def test_moves_and_casts_are_refused(move: str) -> None:
    """Before a first call and after it, and the pipeline is what it was."""
    pipe, reference = pipelined(net().float()), net().float()
    with pytest.raises(errors.UnsupportedError, match=r"before autopipe\.compile"):
        MOVES[move](pipe)
    pipe(ids())
    with pytest.raises(errors.UnsupportedError, match=r"before autopipe\.compile"):
        MOVES[move](pipe)
    assert_same_state(pipe, reference)
    torch.testing.assert_close(pipe(ids()), reference(ids()))


@pytest.mark.parametrize(
    "move", [lambda m: m.to("cpu"), lambda m: m.double(), lambda m: m.to(), lambda m: m.cpu()]
)
def test_a_move_that_changes_nothing(move: Callable[[nn.Module], Any]) -> None:
    def loop(module: nn.Module) -> Any:
        loss_of(module)
        assert move(module) is module
        return train(module)

    alike(loop)


def test_the_model_itself_may_be_cast() -> None:
    """Behind the pipeline's back, so to say: its next call works with what it finds."""

    def loop(module: nn.Module) -> Any:
        losses = train(module, 2)
        (module.model if isinstance(module, autopipe.Pipeline) else module).double()
        return [loss.dtype for loss in losses], train(module, 2)[0].dtype

    model = net().float()
    reference = copy.deepcopy(model)
    pipe = pipelined(model)
    for module in (pipe, reference):
        assert loop(module) == ([torch.float32] * 2, torch.float64)
    for p, q in zip(pipe.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)  # two steps were of single precision


# ------------------------------------------------------------------------------- checkpoints


def test_states_go_into_the_model_and_back() -> None:
    def loop(module: nn.Module) -> Any:
        train(module, 1)
        inner = module.model if isinstance(module, autopipe.Pipeline) else module
        other = Net().double()
        other.load_state_dict(module.state_dict())
        train(other, 2)
        assert module.load_state_dict(other.state_dict(), strict=True) == ((), ()) or True
        inner.load_state_dict(other.state_dict())
        return train(module, 2)

    alike(loop)


def test_strict_loading() -> None:
    pipe, model = pipelined(net()), net()
    state = {k: v + 1 for k, v in model.state_dict().items()}
    missing, unexpected = dict(state), dict(state)
    del missing["norm.bias"]
    unexpected["more"] = torch.ones(1)
    for module in (pipe, model):
        with pytest.raises(RuntimeError, match=r"Missing key.*norm\.bias"):
            module.load_state_dict(missing)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
            module.load_state_dict(unexpected)
        found = module.load_state_dict(missing | unexpected, strict=False)
        assert (found.missing_keys, found.unexpected_keys) == ([], ["more"])
        found = module.load_state_dict(missing, strict=False)
        assert (found.missing_keys, found.unexpected_keys) == (["norm.bias"], [])
    assert_same_state(pipe, model)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_while_training(assign: bool) -> None:
    """Back to an earlier state, of the optimizer too; with `assign` the parameters are others."""

    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        first, kept = [], copy.deepcopy((module.state_dict(), optimizer.state_dict()))
        for step in range(6):
            if step == 3:
                module.load_state_dict(copy.deepcopy(kept[0]), assign=assign)
                module.head.weight = module.table.weight  # which assign has undone
                optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
                optimizer.load_state_dict(kept[1])
            optimizer.zero_grad()
            loss = loss_of(module, step % 3)
            loss.backward()
            optimizer.step()
            first.append(loss)
        assert_close(torch.stack(first[:3]), torch.stack(first[3:]))
        return first

    alike(loop)


def test_parameters_replaced_between_forward_and_backward() -> None:
    """In eager torch the gradient goes to those that the forward used."""

    def loop(module: nn.Module) -> Any:
        loss, used = loss_of(module), module.first.weight
        module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
        with torch.no_grad():
            module.first.weight.mul_(2)
        loss.backward()
        assert module.first.weight.grad is None
        return used.grad

    alike(loop)


def test_safetensors_of_tied_weights(tmp_path: Path) -> None:
    pipe, model = pipelined(net()), net()
    train(pipe), train(model)
    safetensors.torch.save_model(pipe, str(tmp_path / "pipe"))
    safetensors.torch.save_model(model, str(tmp_path / "model"))
    names = [sorted(safetensors.torch.load_file(tmp_path / n)) for n in ("pipe", "model")]
    assert names[0] == names[1]
    for loaded in (net(), pipelined(Net().double())):
        safetensors.torch.load_model(loaded, str(tmp_path / "pipe"))
        assert loaded.head.weight is loaded.table.weight
        assert_close(loss_of(loaded, 5), loss_of(model, 5))
    assert_close(loss_of(model, 5), loss_of(pipe, 5))


def test_safetensors_of_a_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    pipe = pipelined(model)
    pipe(torch.randn(7, 6)).sum().backward()
    safetensors.torch.save_file(pipe.state_dict(), tmp_path / "state")
    loaded = safetensors.torch.load_file(tmp_path / "state")
    assert set(loaded) == set(model.state_dict())
    other = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    pipelined(other).load_state_dict(loaded)
    for (name, a), b in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Counting(Net):
    """With state that is no tensor, as `get_extra_state` provides for."""

    steps = 0

    def get_extra_state(self) -> Any:
        return {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]


class Headed(nn.Module):
    """A pipeline as a part of something larger."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.last = body, nn.Linear(11, 11).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


def test_a_pipeline_within_a_larger_model() -> None:
    models = [Headed(net()), Headed(net())]
    models[1].load_state_dict(models[0].state_dict())
    models[0].body = pipelined(models[0].body)
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    for model in models:
        train(model)
    assert_same_state(*models)
    states = [copy.deepcopy(m.state_dict()) for m in models]
    for model, state in zip(models, reversed(states), strict=True):
        model.load_state_dict(state)
        train(model, 1)
    assert_same_state(*models)


def test_extra_state_within_a_larger_model() -> None:
    source, target = Headed(pipelined(Counting())), Headed(pipelined(Counting()))
    source.body.model.steps = 7
    target.load_state_dict(source.state_dict())
    assert target.body.model.steps == 7


def test_extra_state() -> None:
    source, target = pipelined(Counting()), pipelined(Counting())
    source.model.steps = 7
    target.load_state_dict(source.state_dict())
    assert target.model.steps == 7
