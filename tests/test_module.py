"""Promise 1 and the ordinary loop: the pipeline is the model's own module.

Truth is the model itself (a copy of it) in eager torch, on the whole batch.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autopipe
from autopipe.errors import OptionError

pytestmark = [pytest.mark.few(3), pytest.mark.usefixtures("alike_models_once")]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()))


def same_gradients(a: nn.Module, b: nn.Module, tolerance: float = 2e-6) -> bool:
    """Both absent or both close, relative to the largest gradient."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    assert pairs
    scale = max([1.0, *(q.grad.abs().max().item() for _, q in pairs if q.grad is not None)])
    return all(
        (p.grad is None and q.grad is None)
        or (p.grad is not None and (p.grad - q.grad).abs().max() <= tolerance * scale)
        for p, q in pairs
    )


def check(model: nn.Module, *args: Any, tolerance: float = 2e-6, **options: Any) -> None:
    """Outputs and gradients of a training step against a copy of the model."""
    reference = copy.deepcopy(model)
    pipe = autopipe.compile(model, **({"devices": 2, "chunks": 3} | options))
    result, expected = pipe(*args), reference(*args)
    total = expected_total = torch.zeros(())
    pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True)
    for found, wanted in pairs:
        assert close(found, wanted, tolerance)
        total = total + found.pow(2).sum()
        expected_total = expected_total + wanted.pow(2).sum()
    total.backward()
    expected_total.backward()
    assert same_gradients(model, reference, tolerance)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cells = kind(6, 8, batch_first=True, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


class Spectrum(nn.Module):
    """Complex values in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(self.first(x))
        f = f * torch.polar(torch.ones(5), torch.arange(5.0))
        return self.last(torch.fft.irfft(f, n=8))


class Views(nn.Module):
    """Results that are views of one another, and of nothing new."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.first(x)
        v, w = h[:, :3], h.view(-1, 2, 3)
        return self.last(v) + w.sum(1).repeat(1, 2) + h, v, h.t().t()


KINDS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "sequential": lambda: (mlp(), X),
    "fx graph": lambda: (torch.fx.symbolic_trace(mlp()), X),
    "lstm": lambda: (Recurrent(nn.LSTM), torch.randn(7, 5, 6)),
    "gru": lambda: (Recurrent(nn.GRU, num_layers=2), torch.randn(7, 5, 6)),
    "complex": lambda: (Spectrum(), torch.randn(7, 8)),
    "views": lambda: (Views(), X),
    "channels last": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()),
        torch.randn(7, 3, 8, 8).to(memory_format=torch.channels_last),
    ),
    "permuted": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()),
        torch.randn(7, 8, 8, 6).permute(0, 3, 1, 2)[:, ::2],
    ),
    "double": lambda: (mlp().double(), X.double()),
}


@pytest.mark.parametrize("remat", ["none", "full", "min-cut"])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.xdist_group(f"kind {k}")) for k in KINDS]
)
def test_kinds_of_models(kind: str, remat: str) -> None:
    torch.manual_seed(0)
    model, x = KINDS[kind]()
    check(model, x, remat=remat)


def test_exported_program() -> None:
    model = mlp()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    pipe = autopipe.compile(program, 2, 3)
    assert close(pipe(X), model(X))
    assert [id(p) for p in pipe.parameters()] == [id(p) for p in model.parameters()]
    assert list(pipe.state_dict()) == list(model.state_dict())
    fixed = torch.export.export(model, (X,))
    with pytest.raises(autopipe.errors.CaptureError, match="dynamic batch dimension"):
        autopipe.compile(fixed, 2, 3)(X)


def test_the_models_own_objects() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pipe = autopipe.compile(model, 2, 3)
    assert [(n, id(p)) for n, p in pipe.named_parameters()] == [
        (n, id(p)) for n, p in model.named_parameters()
    ]
    assert [n for n, _ in pipe.named_modules()] == [n for n, _ in model.named_modules()]
    pipe(X).sum().backward()
    before = model[0].weight.clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert [id(p) for p in pipe.parameters()] == [id(p) for p in model.parameters()]


def test_state_dict_both_ways() -> None:
    model, other = mlp(), mlp()
    pipe = autopipe.compile(model, 2, 3, args=(X,))
    changed = {k: v + 1 for k, v in other.state_dict().items()}
    pipe.load_state_dict(changed)
    other.load_state_dict(pipe.state_dict())
    assert close(pipe(X), other(X))
    assert torch.equal(model[0].weight, changed["0.weight"])


def test_training_steps_with_adam() -> None:
    model, reference = mlp(), mlp()
    pipe = autopipe.compile(model, 2, 4)
    ours = torch.optim.AdamW(pipe.parameters(), 1e-2)
    theirs = torch.optim.AdamW(reference.parameters(), 1e-2)
    for step in range(10):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        losses = []
        for module, optimizer in ((pipe, ours), (reference, theirs)):
            losses.append(module(x).pow(2).mean())
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert close(losses[0], losses[1], 1e-5)


def test_modes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    pipe = autopipe.compile(model, 2, 3)
    pipe(torch.randn(9, 6)).sum().backward()
    assert pipe.eval() is pipe
    assert not any(m.training for m in model.modules())
    with torch.no_grad():
        expected, found = model(X), pipe(X)
    assert close(found, expected)
    assert not found.requires_grad
    with torch.inference_mode():
        assert close(pipe(X), expected)
    assert pipe(X).requires_grad
    pipe.train()
    assert all(m.training for m in model.modules())
    assert not torch.equal(pipe(X), pipe(X)), "dropout draws anew without a seed in between"


def test_frozen_and_thawed() -> None:
    model = mlp()
    model[2].weight.requires_grad_(False)
    reference = copy.deepcopy(model)
    pipe = autopipe.compile(model, 2, 3)
    for module in (pipe, reference):
        module(X).sum().backward()
    assert model[2].weight.grad is None
    assert same_gradients(model, reference)
    for module in (model, reference):
        module[2].weight.requires_grad_(True)
        module.zero_grad()
    for module in (pipe, reference):
        module(X).sum().backward()
    assert model[2].weight.grad is not None
    assert same_gradients(model, reference)


def test_accumulation_and_several_calls_in_one_backward() -> None:
    model, reference = mlp(), mlp()
    pipe = autopipe.compile(model, 2, 3)
    for module in (pipe, reference):
        for batch in (5, 6, 7):
            x = torch.randn(batch, 6, generator=torch.Generator().manual_seed(batch))
            module(x).sum().backward()
        (module(X).sum() + module(X[:4]).pow(2).sum()).backward()
    assert same_gradients(model, reference)


def test_batches_of_every_size() -> None:
    model = mlp()
    pipe = autopipe.compile(model, 2, 4)
    for batch in (1, 2, 3, 4, 5, 9, 4):
        x = torch.ones(batch, 6)
        assert close(pipe(x), model(x))


def test_hooks_on_parameters() -> None:
    model, seen = mlp(), []
    model[0].weight.register_hook(lambda g: seen.append("gradient"))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    autopipe.compile(model, 2, 3)(X).sum().backward()
    assert seen == ["gradient", "accumulated"]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies(clone: Callable[[Any], Any]) -> None:
    model = mlp()
    pipe = autopipe.compile(model, 2, 3)
    pipe(X)
    twin = clone(pipe)
    out = twin(X)
    out.sum().backward()
    assert close(out, model(X))
    assert model[0].weight.grad is None
    assert next(twin.parameters()).grad is not None
    assert {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()} == set()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * mask)


@pytest.mark.parametrize("in_dims", [{"x": 1, "mask": None}, (1, None), (-2, None)])
def test_in_dims(in_dims: Any) -> None:
    torch.manual_seed(0)
    model = Masked()
    pipe = autopipe.compile(model, 2, 3, in_dims=in_dims)
    x, mask = torch.randn(5, 7, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    gradients = []
    for module in (pipe, model):
        out = module(x, mask)
        gradients.append((out, *torch.autograd.grad(out.pow(2).sum(), (x, mask))))
    assert all(close(a, b) for a, b in zip(*gradients, strict=True))


def test_autocast() -> None:
    model, reference = mlp(), mlp()
    pipe = autopipe.compile(model, 2, 1)
    outs = []
    for module in (pipe, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(module(X))
        outs[-1].float().pow(2).sum().backward()
    assert outs[0].dtype is torch.bfloat16
    assert torch.equal(outs[0], outs[1])
    assert same_gradients(model, reference)
    assert pipe(X).dtype is torch.float32


class TwoResults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(self.first(x))
        return h, self.last(h)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_from_changing_outputs(remat: str) -> None:
    """The program is made for gradients from some outputs; others may get them next time."""
    torch.manual_seed(0)
    model = TwoResults()
    reference = copy.deepcopy(model)
    pipe = autopipe.compile(model, 2, 3, remat=remat, batch_norm="micro")
    for which in (0, 1, 0, 1):
        model.zero_grad()
        reference.zero_grad()
        pipe(X)[which].pow(2).sum().backward()
        for chunk in X.tensor_split(3):
            reference(chunk)[which].pow(2).sum().backward()
        assert same_gradients(model, reference, 1e-5)
        assert close(model.norm.running_mean, reference.norm.running_mean)
        assert model.norm.num_batches_tracked == reference.norm.num_batches_tracked


def test_buffers_that_change_in_the_forward() -> None:
    """Spectral norm's power iteration writes to its vectors before it uses them."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))
    reference = copy.deepcopy(model)
    autopipe.compile(model, 2, 3, remat="full")(X).sum().backward()
    for chunk in X.tensor_split(3):
        reference(chunk).sum().backward()
    assert same_gradients(model, reference, 1e-5)
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        assert close(ours, theirs)


def test_step() -> None:
    model, reference = mlp(), mlp()
    pipe = autopipe.compile(model, 2, 3, loss_fn=nn.functional.mse_loss)
    target = torch.zeros(7, 3)
    loss = pipe.step(X, target=target)
    expected = nn.functional.mse_loss(reference(X), target)
    expected.backward()
    assert close(loss, expected)
    assert not loss.requires_grad
    assert same_gradients(model, reference)


def test_an_input_that_is_returned_is_the_callers_own() -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"x": x, "y": torch.tanh(x), "flag": True}

    result = autopipe.compile(Echo(), 1, 2)(X)
    assert result["x"] is X
    assert result["flag"] is True
    assert close(result["y"], torch.tanh(X))


def test_python_values_are_part_of_the_graph() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return torch.tanh(x) * scale

    pipe = autopipe.compile(Scaled(), 1, 2, args=(X,), kwargs={"scale": 3.0})
    assert close(pipe(X, scale=3.0), torch.tanh(X) * 3)
    assert close(pipe(X, scale=4.0), torch.tanh(X) * 4)


def test_coupled_models_run_in_one_chunk() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x - x.mean(0))

    assert close(autopipe.compile(Centred(), 1, 1)(X), Centred()(X))
    with pytest.raises(autopipe.errors.CouplingError, match="mean"):
        autopipe.compile(Centred(), 1, 2)(X)


@pytest.mark.parametrize("tolerance", [-1, float("nan"), "a", True])
def test_verify_with_a_tolerance_that_is_none(tolerance: Any) -> None:
    pipe = autopipe.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["cpu", "cpu"], 2)
    with pytest.raises(OptionError, match="tolerance"):
        pipe.verify(torch.randn(4, 4), tolerance=tolerance)
